from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from ._adjoint.implicit import ImplicitAdjoint
from ._cell import cell_name, refuse_coupling
from ._deq import as_solver
from ._internal.checks import (
    check_integer,
    check_part,
    check_value,
    FUNCTION,
    SOLVER,
)
from ._internal.convolution import fast_convolutions
from ._internal.observe import AbstractObserver, observe
from ._internal.parametrise import resolve
from ._internal.pytree import working_dtype
from ._internal.types import Solver, Stats
from ._solver.chain import AbstractChain


class ResidualTrace(eqx.Module):
    """The residuals of a solve: what [`implicitnets.residual_trace`][] returns.

    The arrays have `max_steps + 1` entries: the start, and the iterate after every
    step. Past the end of the solve they repeat the last one.

    **Attributes:**

    - `absolute`: `two_norm(f(z) - z)`.
    - `relative`: `two_norm(f(z) - z) / two_norm(f(z))`.
    - `nfe`: how often the solver has evaluated the map by then, without the trace's own
        evaluations; `None` if the solver does not count them. Of Optimistix' solvers
        only `optimistix.FixedPointIteration` has a count: one for each step.
    - `num_matvecs`: how many Jacobian products the solver has made by then; `None` if
        it makes none or does not count them.
    - `num_steps`: how many steps the solve took.
    - `result`: how it ended.
    """

    absolute: Float[Array, "*batch steps"]
    relative: Float[Array, "*batch steps"]
    nfe: Int[Array, "*batch steps"] | None
    num_matvecs: Int[Array, "*batch steps"] | None
    num_steps: Int[Array, "*batch"]
    result: optx.RESULTS


def residual_trace(
    fn: Callable[[PyTree[Array], Any], PyTree[Array]],
    solver: Solver,
    z0: PyTree[Array],
    args: Any = None,
    *,
    max_steps: int,
) -> ResidualTrace:
    """How the residual falls, step by step, for any Optimistix solver.

    Solves as `optimistix.fixed_point` does, and evaluates the map once more after every
    step. The trace shows the iterates, even if the solver returns the best of them. It
    works under `jit` and `vmap`, and has no gradient.

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

    `TypeError` if `solver` is not a solver, one that needs bounds, or a chain;
    `ValueError` if `max_steps` is negative, `z0` is not of real floating-point arrays,
    or `fn` couples the examples of a batch.
    """
    check_part("residual_trace", "fn", fn, FUNCTION)
    check_part("residual_trace", "solver", solver, SOLVER)
    if isinstance(solver, AbstractChain):
        raise TypeError(
            "`residual_trace` sees every step of a solver, and a chain has none of its "
            "own: trace the solvers in it one by one."
        )
    max_steps = check_integer("residual_trace", "max_steps", max_steps, 0)
    check_value(
        "residual_trace",
        "z0",
        z0,
        all(_is_real(leaf) for leaf in jtu.tree_leaves(z0)),
        "of real floating-point arrays",
    )
    fn_args = resolve(fn), args
    jaxpr, _, _ = eqx.filter_make_jaxpr(_call)(z0, fn_args)
    refuse_coupling(cell_name(fn), jaxpr, "")
    solution = optx.fixed_point(
        _call,
        observe(as_solver(solver), _ResidualObserver(max_steps)),
        z0,
        fn_args,
        max_steps=max_steps,
        adjoint=ImplicitAdjoint(),
        throw=False,
    )
    num_steps = solution.stats["num_steps"]
    last = jnp.minimum(jnp.arange(max_steps + 1), num_steps)
    entries = jtu.tree_map(lambda trace: trace[last], solution.stats["notes"])
    return ResidualTrace(
        absolute=entries.absolute,
        relative=entries.relative,
        nfe=last if isinstance(solver, optx.FixedPointIteration) else entries.nfe,
        num_matvecs=entries.num_matvecs,
        num_steps=num_steps,
        result=solution.result,
    )


def _is_real(leaf: Any) -> bool:
    is_array = eqx.is_array_like(leaf)
    return is_array and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


# A module-level function, so that a trace outside `jit` is compiled once.
def _call(z: PyTree[Array], fn_args: tuple[Callable, Any]) -> PyTree[Array]:
    fn, args = fn_args
    return fast_convolutions(fn)(z, args)


class _Entries(eqx.Module):
    absolute: Float[Array, "..."]
    relative: Float[Array, "..."]
    nfe: Int[Array, "..."] | None
    num_matvecs: Int[Array, "..."] | None


class _ResidualObserver(AbstractObserver):
    max_steps: int

    def init(self, y: PyTree[Array], args: Any, stats: Stats) -> _Entries:
        return jtu.tree_map(
            lambda x: jnp.zeros(self.max_steps + 1, x.dtype).at[0].set(x),
            _entries(y, args, stats),
        )

    def update(
        self,
        notes: _Entries,
        num_steps: Int[Array, ""],
        y: PyTree[Array],
        args: Any,
        stats: Stats,
    ) -> _Entries:
        return jtu.tree_map(
            lambda trace, x: trace.at[num_steps].set(x),
            notes,
            _entries(y, args, stats),
        )


def _entries(y: PyTree[Array], args: Any, stats: Stats) -> _Entries:
    f = _call(y, args)
    dtype = working_dtype(y)
    residual = optx.two_norm(jtu.tree_map(jnp.subtract, f, y)).astype(dtype)
    f_norm = optx.two_norm(f).astype(dtype)
    relative = residual / jnp.where(residual == 0, 1, f_norm)
    counts = stats.get("nfe"), stats.get("num_matvecs")
    return _Entries(residual, relative, *counts)
