import abc
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from .._internal.checks import check_options
from .._internal.loop import SolverState, Unfrozen
from .._internal.manual import vary_like
from .._internal.types import Answer, Aux, Fn, Options, Tags, Verdict, Y
from .progress import Progress, start_progress


_Kept = TypeVar("_Kept")
_Free = TypeVar("_Free")


class Problem(NamedTuple):
    """What stays the same during a solve. Calling it evaluates the function."""

    fn: Fn
    args: Any
    tags: Tags

    def __call__(self, y: Y) -> tuple[Y, Aux]:
        return self.fn(y, self.args)


class AbstractSolver(optx.AbstractIterativeSolver, Generic[_Kept, _Free]):
    """An Optimistix solver whose state is a [`SolverState`][].

    Optimistix goes by the class of a solver, so a subclass also inherits from
    `optimistix.AbstractFixedPointSolver` or `optimistix.AbstractRootFinder`.
    """

    @abc.abstractmethod
    def _start(self, problem: Problem, y: Y) -> tuple[_Kept, _Free]:
        """Both parts of the state before the first step."""

    @abc.abstractmethod
    def _advance(
        self, problem: Problem, y: Y, state: SolverState[_Kept, _Free]
    ) -> tuple[Y, _Kept, _Free, Aux]:
        """One step: the next iterate, both parts of the state, the auxiliary output."""

    @abc.abstractmethod
    def _verdict(self, kept: _Kept) -> Verdict:
        """As `terminate`."""

    @abc.abstractmethod
    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: _Kept) -> Answer:
        """As `postprocess`."""

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Any,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: Tags,
    ) -> SolverState:
        del aux_struct
        check_options(self, options)
        y_struct = jax.eval_shape(lambda: y)
        if _shapes(f_struct) != _shapes(y_struct):
            raise ValueError(
                f"`{type(self).__name__}` is for functions whose value has the "
                f"structure and shapes of their argument; got {f_struct} for "
                f"{y_struct}."
            )
        kept, free = self._start(Problem(fn, args, tags), y)
        state = SolverState(kept, Unfrozen(free), Unfrozen(jnp.array(0)))
        return vary_like(state, y_struct, f_struct)

    def step(
        self, fn: Fn, y: Y, args: Any, options: Options, state: SolverState, tags: Tags
    ) -> tuple[Y, SolverState, Aux]:
        del options
        y, kept, free, aux = self._advance(Problem(fn, args, tags), y, state)
        num_steps = Unfrozen(state.num_steps.value + 1)
        return y, SolverState(kept, Unfrozen(free), num_steps), aux

    def terminate(
        self, fn: Fn, y: Y, args: Any, options: Options, state: SolverState, tags: Tags
    ) -> Verdict:
        del fn, y, args, options, tags
        return self._verdict(state.kept)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Any,
        options: Options,
        state: SolverState,
        tags: Tags,
        result: optx.RESULTS,
    ) -> Answer:
        del options, result
        return self._answer(Problem(fn, args, tags), y, aux, state.kept)

    def accepts(self, y: Y, residual: Y) -> Bool[Array, ""]:
        """Whether the stopping rule holds at an iterate."""
        f = jtu.tree_map(jnp.add, y, residual)
        progress = self._judge(start_progress(y), y, f, residual)
        return progress.converged & progress.finite

    def _judge(self, progress: Progress, y: Y, f: Y, residual: Y) -> Progress:
        """By the solver's own stopping rule."""
        return progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )


def _shapes(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, [leaf.shape for leaf in leaves]
