"""What is written down of a solve while it runs."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree, ScalarLike

from .types import Answer, Aux, Fn, Norm, Options, Stats, Tags, Verdict, Y


class AbstractObserver(eqx.Module):
    @abc.abstractmethod
    def init(self, y: Y, args: Any, stats: Stats) -> PyTree[Array]:
        """The notes before the first step, from the solver's statistics by then."""

    @abc.abstractmethod
    def update(
        self,
        notes: PyTree[Array],
        num_steps: Int[Array, ""],
        y: Y,
        args: Any,
        stats: Stats,
    ) -> PyTree[Array]:
        """The notes after a step that led to `y`, which `num_steps` includes."""


class _State(eqx.Module):
    solver_state: Any
    num_steps: Int[Array, ""]
    notes: PyTree[Array]


class _AbstractObserved(optx.AbstractIterativeSolver):
    solver: eqx.AbstractVar[optx.AbstractIterativeSolver]
    observer: eqx.AbstractVar[AbstractObserver]

    @property
    def rtol(self) -> ScalarLike:
        return self.solver.rtol

    @property
    def atol(self) -> ScalarLike:
        return self.solver.atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Any,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: Tags,
    ) -> _State:
        state = self.solver.init(fn, y, args, options, f_struct, aux_struct, tags)
        aux = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), aux_struct)
        stats = self._stats(fn, y, aux, args, options, state, tags)
        return _State(state, jnp.array(0), self.observer.init(y, args, stats))

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Any,
        options: Options,
        state: _State,
        tags: Tags,
    ) -> tuple[Y, _State, Aux]:
        y, solver_state, aux = self.solver.step(
            fn, y, args, options, state.solver_state, tags
        )
        num_steps = state.num_steps + 1
        stats = self._stats(fn, y, aux, args, options, solver_state, tags)
        notes = self.observer.update(state.notes, num_steps, y, args, stats)
        return y, _State(solver_state, num_steps, notes), aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Any,
        options: Options,
        state: _State,
        tags: Tags,
    ) -> Verdict:
        return self.solver.terminate(fn, y, args, options, state.solver_state, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Any,
        options: Options,
        state: _State,
        tags: Tags,
        result: optx.RESULTS,
    ) -> Answer:
        y, aux, stats = self.solver.postprocess(
            fn, y, aux, args, options, state.solver_state, tags, result
        )
        return y, aux, {**stats, "notes": state.notes}

    def _stats(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Any,
        options: Options,
        state: Any,
        tags: Tags,
    ) -> Stats:
        # The public way to ask a solver for its statistics.
        result = optx.RESULTS.successful
        _, _, stats = self.solver.postprocess(
            fn, y, aux, args, options, state, tags, result
        )
        return stats


# Optimistix goes by the class of a solver, so there is one for every kind.
class _ObservedFixedPoint(_AbstractObserved, optx.AbstractFixedPointSolver):
    solver: optx.AbstractFixedPointSolver
    observer: AbstractObserver


class _ObservedRootFind(_AbstractObserved, optx.AbstractRootFinder):
    solver: optx.AbstractRootFinder
    observer: AbstractObserver


class _ObservedLeastSquares(_AbstractObserved, optx.AbstractLeastSquaresSolver):
    solver: optx.AbstractLeastSquaresSolver
    observer: AbstractObserver


class _ObservedMinimise(_AbstractObserved, optx.AbstractMinimiser):
    solver: optx.AbstractMinimiser
    observer: AbstractObserver


_OBSERVED: dict[type, Any] = {
    optx.AbstractFixedPointSolver: _ObservedFixedPoint,
    optx.AbstractRootFinder: _ObservedRootFind,
    optx.AbstractLeastSquaresSolver: _ObservedLeastSquares,
    optx.AbstractMinimiser: _ObservedMinimise,
}


def observed(solver_or_state: Any) -> Any:
    """The solver or the state within; those that are not observed are returned."""
    while isinstance(solver_or_state, _AbstractObserved):
        solver_or_state = solver_or_state.solver
    while isinstance(solver_or_state, _State):
        solver_or_state = solver_or_state.solver_state
    return solver_or_state


def observe(solver: Any, observer: AbstractObserver) -> Any:
    """A solver that takes the same steps and has notes on each in its statistics."""
    for kind, wrapper in _OBSERVED.items():
        if isinstance(solver, kind):
            return wrapper(solver, observer)
    raise TypeError(f"`solver` must be an Optimistix solver; got {solver!r}.")
