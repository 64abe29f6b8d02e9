import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree


class AbstractObserver(eqx.Module):
    """What to write down of a solve while it runs: see [`observe`][]."""

    @abc.abstractmethod
    def init(self, y: PyTree[Array], args: Any, stats: dict[str, Any]) -> PyTree[Array]:
        """The notes before the first step.

        **Arguments:**

        - `y`: the initial guess.
        - `args`: those of the solve.
        - `stats`: the solver's statistics so far.

        **Returns:**

        The notes, a pytree of arrays.
        """

    @abc.abstractmethod
    def update(
        self,
        notes: PyTree[Array],
        num_steps: Int[Array, ""],
        y: PyTree[Array],
        args: Any,
        stats: dict[str, Any],
    ) -> PyTree[Array]:
        """The notes after a step.

        **Arguments:**

        - `notes`: those so far.
        - `num_steps`: how many steps there were, this one included.
        - `y`: the iterate after the step.
        - `args`, `stats`: as in `init`.

        **Returns:**

        The new notes.
        """


class _ObservedState(eqx.Module):
    solver_state: Any
    num_steps: Int[Array, ""]
    notes: PyTree[Array]


class _AbstractObserved(optx.AbstractIterativeSolver):
    solver: eqx.AbstractVar[optx.AbstractIterativeSolver]
    observer: eqx.AbstractVar[AbstractObserver]

    @property
    def rtol(self):
        return self.solver.rtol

    @property
    def atol(self):
        return self.solver.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        state = self.solver.init(fn, y, args, options, f_struct, aux_struct, tags)
        aux = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), aux_struct)
        stats = self._stats(fn, y, aux, args, options, state, tags)
        return _ObservedState(state, jnp.array(0), self.observer.init(y, args, stats))

    def step(self, fn, y, args, options, state, tags):
        y, solver_state, aux = self.solver.step(
            fn, y, args, options, state.solver_state, tags
        )
        num_steps = state.num_steps + 1
        stats = self._stats(fn, y, aux, args, options, solver_state, tags)
        notes = self.observer.update(state.notes, num_steps, y, args, stats)
        return y, _ObservedState(solver_state, num_steps, notes), aux

    def terminate(self, fn, y, args, options, state, tags):
        return self.solver.terminate(fn, y, args, options, state.solver_state, tags)

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        y, aux, stats = self.solver.postprocess(
            fn, y, aux, args, options, state.solver_state, tags, result
        )
        return y, aux, {**stats, "notes": state.notes}

    def _stats(self, fn, y, aux, args, options, state, tags):
        # The public way to ask a solver for its statistics.
        result = optx.RESULTS.successful
        return self.solver.postprocess(fn, y, aux, args, options, state, tags, result)[
            2
        ]


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
    """What an observer was put around: the solver, or its state.

    **Arguments:**

    - `solver_or_state`: a solver or its state, observed or not.

    **Returns:**

    The solver or the state itself.
    """
    while isinstance(solver_or_state, _AbstractObserved):
        solver_or_state = solver_or_state.solver
    while isinstance(solver_or_state, _ObservedState):
        solver_or_state = solver_or_state.solver_state
    return solver_or_state


def observe(solver: Any, observer: AbstractObserver) -> Any:
    """A solver that takes the same steps, and writes something down after each.

    **Arguments:**

    - `solver`: any Optimistix solver.
    - `observer`: what to write down.

    **Returns:**

    A solver of the same kind. The notes are in its statistics, as `notes`.

    **Raises:**

    `TypeError` for what is no solver.
    """
    for kind, wrapper in _OBSERVED.items():
        if isinstance(solver, kind):
            return wrapper(solver, observer)
    raise TypeError(f"`solver` must be an Optimistix solver; got {solver!r}.")
