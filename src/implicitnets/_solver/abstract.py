import abc
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree

from .._internal.checks import check_options
from .._internal.loop import SolverState, Unfrozen
from .._internal.types import Fn, Options, Stats, Tags
from .progress import Progress


_Kept = TypeVar("_Kept")
_Free = TypeVar("_Free")


class Problem(NamedTuple):
    """What stays the same during a solve. Calling it evaluates the function.

    **Attributes:**

    - `fn`, `args`, `tags`: as in Optimistix.
    """

    fn: Fn
    args: Any
    tags: Tags

    def __call__(self, y: PyTree[Array]) -> tuple[PyTree[Array], Any]:
        """The function's value and auxiliary output."""
        return self.fn(y, self.args)


class AbstractSolver(optx.AbstractIterativeSolver, Generic[_Kept, _Free]):
    """An Optimistix solver whose state is a [`SolverState`][].

    A subclass also inherits from the class of solvers that it belongs to, by which
    Optimistix goes.
    """

    @abc.abstractmethod
    def _start(self, problem: Problem, y: PyTree[Array]) -> tuple[_Kept, _Free]:
        """Both parts of the state before the first step."""

    @abc.abstractmethod
    def _advance(
        self,
        problem: Problem,
        y: PyTree[Array],
        kept: _Kept,
        free: _Free,
        num_steps: Int[Array, ""],
    ) -> tuple[PyTree[Array], _Kept, _Free, Any]:
        """One step: the next iterate, the new parts and the auxiliary output."""

    @abc.abstractmethod
    def _verdict(self, kept: _Kept) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """As `terminate`."""

    @abc.abstractmethod
    def _answer(
        self, problem: Problem, y: PyTree[Array], aux: Any, kept: _Kept
    ) -> tuple[PyTree[Array], Any, Stats]:
        """As `postprocess`."""

    def init(
        self,
        fn: Fn,
        y: PyTree[Array],
        args: Any,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: Tags,
    ) -> SolverState[_Kept, _Free]:
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
        return SolverState(kept, Unfrozen(free), Unfrozen(jnp.array(0)))

    def step(
        self,
        fn: Fn,
        y: PyTree[Array],
        args: Any,
        options: Options,
        state: SolverState[_Kept, _Free],
        tags: Tags,
    ) -> tuple[PyTree[Array], SolverState[_Kept, _Free], Any]:
        del options
        num_steps = state.num_steps.value
        y, kept, free, aux = self._advance(
            Problem(fn, args, tags), y, state.kept, state.free.value, num_steps
        )
        return y, SolverState(kept, Unfrozen(free), Unfrozen(num_steps + 1)), aux

    def terminate(
        self,
        fn: Fn,
        y: PyTree[Array],
        args: Any,
        options: Options,
        state: SolverState[_Kept, _Free],
        tags: Tags,
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        del fn, y, args, options, tags
        return self._verdict(state.kept)

    def postprocess(
        self,
        fn: Fn,
        y: PyTree[Array],
        aux: Any,
        args: Any,
        options: Options,
        state: SolverState[_Kept, _Free],
        tags: Tags,
        result: optx.RESULTS,
    ) -> tuple[PyTree[Array], Any, Stats]:
        del options, result
        return self._answer(Problem(fn, args, tags), y, aux, state.kept)

    def _judge(
        self,
        progress: Progress,
        y: PyTree[Array],
        f: PyTree[Array],
        residual: PyTree[Array],
    ) -> Progress:
        """By the solver's own stopping rule."""
        return progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )


def _shapes(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, [leaf.shape for leaf in leaves]
