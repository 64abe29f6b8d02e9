from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from ._adjoint.implicit import ImplicitAdjoint
from ._convolution import fast_convolutions
from ._misc import working_dtype


class ResidualTrace(eqx.Module):
    """The residuals of a solve: what [`implicitnets.residual_trace`][] returns.

    The arrays hold the start and the iterate after every step, `max_steps + 1` entries.
    Past the end of the solve they repeat the last one.

    **Attributes:**

    - `absolute`: `two_norm(f(z) - z)`.
    - `relative`: `two_norm(f(z) - z) / two_norm(f(z))`.
    - `nfe`: evaluations by then, those of the solver and not of the trace; `None` for a
        solver that does not tell.
    - `num_steps`: how many steps the solve took.
    - `result`: how it ended.
    """

    absolute: Float[Array, "*batch steps"]
    relative: Float[Array, "*batch steps"]
    nfe: Int[Array, "*batch steps"] | None
    num_steps: Int[Array, "*batch"]
    result: optx.RESULTS


def residual_trace(
    fn: Callable[[PyTree[Array], Any], PyTree[Array]],
    solver: optx.AbstractFixedPointSolver
    | optx.AbstractRootFinder
    | optx.AbstractLeastSquaresSolver
    | optx.AbstractMinimiser,
    z0: PyTree[Array],
    args: Any = None,
    *,
    max_steps: int,
) -> ResidualTrace:
    """How the residual falls, step by step, for any Optimistix solver.

    Solves as `optimistix.fixed_point` does, and evaluates the map once more after every
    step. The trace shows the iterates, also where the solver returns the best of them.
    Can be used under `jit` and `vmap`. Not to be differentiated.

    **Arguments:**

    - `fn`: `fn(z, args) -> z`, the map whose fixed point is sought.
    - `solver`: any Optimistix fixed-point solver, root finder, least-squares solver or
        minimiser.
    - `z0`: where to start.
    - `args`: passed on to `fn`.
    - `max_steps`: the largest number of steps. Keyword only argument.

    **Returns:**

    A [`implicitnets.ResidualTrace`][].

    **Raises:**

    `TypeError` for what is no solver.
    """
    solution = optx.fixed_point(
        _call,
        _recorder(solver, max_steps),
        z0,
        (fn, args),
        max_steps=max_steps,
        adjoint=ImplicitAdjoint(),
        throw=False,
    )
    num_steps = solution.stats["num_steps"]
    last = jnp.minimum(jnp.arange(max_steps + 1), num_steps)
    entries = jtu.tree_map(lambda trace: trace[last], solution.stats["entries"])
    return ResidualTrace(
        absolute=entries.absolute,
        relative=entries.relative,
        nfe=entries.nfe,
        num_steps=num_steps,
        result=solution.result,
    )


# A module-level function, so that a trace outside `jit` is compiled once.
def _call(z, fn_args):
    fn, args = fn_args
    return fast_convolutions(fn)(z, args)


class _Entries(eqx.Module):
    absolute: Float[Array, "..."]
    relative: Float[Array, "..."]
    nfe: Int[Array, "..."] | None


class _RecorderState(eqx.Module):
    solver_state: Any
    num_steps: Int[Array, ""]
    entries: _Entries


class _AbstractRecorder(optx.AbstractIterativeSolver):
    """A solver that writes down the residual of every iterate of another one."""

    solver: eqx.AbstractVar[optx.AbstractIterativeSolver]
    max_steps: eqx.AbstractVar[int]

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
        entry = self._entry(fn, y, aux, args, options, state, tags)
        entries = jtu.tree_map(
            lambda x: jnp.zeros(self.max_steps + 1, x.dtype).at[0].set(x), entry
        )
        return _RecorderState(state, jnp.array(0), entries)

    def step(self, fn, y, args, options, state, tags):
        y, solver_state, aux = self.solver.step(
            fn, y, args, options, state.solver_state, tags
        )
        num_steps = state.num_steps + 1
        entry = self._entry(fn, y, aux, args, options, solver_state, tags)
        entries = jtu.tree_map(
            lambda trace, x: trace.at[num_steps].set(x), state.entries, entry
        )
        return y, _RecorderState(solver_state, num_steps, entries), aux

    def terminate(self, fn, y, args, options, state, tags):
        return self.solver.terminate(fn, y, args, options, state.solver_state, tags)

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        y, aux, _ = self.solver.postprocess(
            fn, y, aux, args, options, state.solver_state, tags, result
        )
        return y, aux, {"entries": state.entries}

    def _entry(self, fn, y, aux, args, options, solver_state, tags):
        f = _call(y, args)
        dtype = working_dtype(y)
        residual = optx.two_norm(jtu.tree_map(jnp.subtract, f, y)).astype(dtype)
        f_norm = optx.two_norm(f).astype(dtype)
        relative = residual / jnp.where(residual == 0, 1, f_norm)
        # The public way to ask a solver for its count.
        _, _, stats = self.solver.postprocess(
            fn, y, aux, args, options, solver_state, tags, optx.RESULTS.successful
        )
        return _Entries(residual, relative, stats.get("nfe"))


# Optimistix goes by the class of a solver, so there is one for every kind.
class _FixedPointRecorder(_AbstractRecorder, optx.AbstractFixedPointSolver):
    solver: optx.AbstractFixedPointSolver
    max_steps: int


class _RootFindRecorder(_AbstractRecorder, optx.AbstractRootFinder):
    solver: optx.AbstractRootFinder
    max_steps: int


class _LeastSquaresRecorder(_AbstractRecorder, optx.AbstractLeastSquaresSolver):
    solver: optx.AbstractLeastSquaresSolver
    max_steps: int


class _MinimiseRecorder(_AbstractRecorder, optx.AbstractMinimiser):
    solver: optx.AbstractMinimiser
    max_steps: int


_RECORDERS: dict[type, Any] = {
    optx.AbstractFixedPointSolver: _FixedPointRecorder,
    optx.AbstractRootFinder: _RootFindRecorder,
    optx.AbstractLeastSquaresSolver: _LeastSquaresRecorder,
    optx.AbstractMinimiser: _MinimiseRecorder,
}


def _recorder(solver: Any, max_steps: int) -> Any:
    for kind, recorder in _RECORDERS.items():
        if isinstance(solver, kind):
            return recorder(solver, max_steps)
    raise TypeError(f"`solver` must be an Optimistix solver; got {solver!r}.")
