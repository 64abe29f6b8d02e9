from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree, Scalar

from .._misc import (
    check_hyperparameter,
    check_tolerances,
    tree_all_finite,
    working_dtype,
)
from .progress import Progress, start_progress
from .pseudo_transient import PseudoTransient


class _SteadyStateState(eqx.Module):
    progress: Progress
    field: PyTree[Array]
    start: Scalar
    end: Scalar
    solver_state: PyTree
    controller_state: PyTree
    failed: Array
    num_accepted_steps: Int[Array, ""]
    num_rejected_steps: Int[Array, ""]


def _cast(tree: PyTree[Array], dtype: Any) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def _cast_like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), tree, like)


def _as_arrays(tree: PyTree) -> PyTree:
    # What a loop carries must be arrays, while Diffrax' solvers and controllers also
    # keep Python Booleans.
    return jtu.tree_map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)


def _where(pred: Array, new: PyTree, old: PyTree) -> PyTree:
    return jtu.tree_map(
        lambda n, o: jnp.where(pred, n, o) if eqx.is_array(n) else n, new, old
    )


def _tableau(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    # `issubclass`, as `isinstance` also holds for what wraps a Runge-Kutta method.
    if issubclass(type(solver), dfx.AbstractRungeKutta):
        tableau = solver.tableau
        if isinstance(tableau, dfx.ButcherTableau):
            return tableau
    return None


class SteadyState(optx.AbstractRootFinder):
    """The steady state of `dz/dt = F(z)` as a root finder, by any Diffrax solver."""

    ode_solver: dfx.AbstractSolver
    rtol: float = 1e-4
    atol: float = 1e-6
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    stepsize_controller: dfx.AbstractStepSizeController = PseudoTransient()
    dt0: float = 1.0

    def __check_init__(self):
        check_tolerances(self)
        if isinstance(self.dt0, int | float):
            check_hyperparameter(self, "dt0", self.dt0 > 0, "positive")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del options, f_struct, aux_struct, tags
        dtype = working_dtype(y)
        z = _cast(y, dtype)
        field = _vector_field(fn, y)(0.0, z, args)
        terms = dfx.ODETerm(_vector_field(fn, y, z, field))
        controller = self.stepsize_controller.wrap(1)
        start = jnp.zeros((), dtype)
        end, controller_state = controller.init(
            terms,
            start,
            jnp.array(jnp.inf, dtype),
            z,
            jnp.asarray(self.dt0, dtype),
            args,
            self.ode_solver.func,
            self.ode_solver.error_order(terms),
        )
        solver_state = self.ode_solver.init(terms, start, end, z, args)
        return _SteadyStateState(
            progress=self._judge(start_progress(y), y, field),
            field=field,
            start=start,
            end=end,
            solver_state=_as_arrays(self._hand_over(solver_state, field)),
            controller_state=_as_arrays(controller_state),
            failed=jnp.array(False),
            num_accepted_steps=jnp.array(0),
            num_rejected_steps=jnp.array(0),
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        z0 = _cast(y, working_dtype(y))
        terms = dfx.ODETerm(_vector_field(fn, y, z0, state.field))
        solver = self._with_inner_tolerances(terms, state)
        z1, error, _, solver_state, result = solver.step(
            terms, state.start, state.end, z0, args, state.solver_state, False
        )
        new_y = _cast_like(z1, y)
        field = self._end_field(fn, new_y, z1, args, solver_state)
        if error is None:
            # The difference to the trapezoidal rule.
            dt = state.end - state.start
            error = jtu.tree_map(
                lambda a, b, f0, f1: a + 0.5 * dt * (f0 + f1) - b,
                z0, z1, state.field, field,
            )
        usable = (
            (result == dfx.RESULTS.successful)
            & tree_all_finite(field)
            & tree_all_finite(error)
        )
        error = jtu.tree_map(lambda e: jnp.where(usable, e, jnp.inf), error)
        controller = self.stepsize_controller.wrap(1)
        if isinstance(controller, PseudoTransient):
            adapt = lambda *a: controller.adapt_to_field(state.field, field, *a)
        else:
            adapt = controller.adapt_step_size
        keep, start, end, _, controller_state, control_result = adapt(
            state.start,
            state.end,
            z0,
            z1,
            args,
            error,
            self.ode_solver.error_order(terms),
            state.controller_state,
        )
        keep = jnp.asarray(keep)
        start = jnp.asarray(start, state.start.dtype)
        end = jnp.asarray(end, state.end.dtype)
        judged = self._judge(state.progress, new_y, field)
        improved = keep | (judged.error < state.progress.best_error)
        _, aux = jax.eval_shape(fn, y, args)
        new_state = _SteadyStateState(
            progress=_where(improved, judged, state.progress),
            field=_where(keep, field, state.field),
            start=start,
            end=end,
            solver_state=_where(
                keep,
                _as_arrays(self._hand_over(solver_state, field)),
                state.solver_state,
            ),
            controller_state=_as_arrays(controller_state),
            failed=(end <= start) | (control_result != dfx.RESULTS.successful),
            num_accepted_steps=state.num_accepted_steps + jnp.where(keep, 1, 0),
            num_rejected_steps=state.num_rejected_steps + jnp.where(keep, 0, 1),
        )
        zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), aux)
        return _where(keep, new_y, y), new_state, zeros

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        converged, result = state.progress.verdict()
        result = optx.RESULTS.where(
            state.failed & ~converged & (result == optx.RESULTS.successful),
            optx.RESULTS.nonlinear_divergence,
            result,
        )
        return converged, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, y, args, options, tags, result
        num_steps = state.num_accepted_steps + state.num_rejected_steps
        stats = {
            "num_accepted_steps": state.num_accepted_steps,
            "num_rejected_steps": state.num_rejected_steps,
            "final_time": state.start,
        }
        evaluations = self._evaluations_per_step()
        if evaluations is not None:
            stats["nfe"] = 1 + evaluations * num_steps
        return state.progress.best_y, aux, stats

    def _judge(self, progress, y, field):
        f = jtu.tree_map(lambda a, b: a.astype(b.dtype) + b, y, field)
        return progress.update(
            y, f, field, rtol=self.rtol, atol=self.atol, norm=self.norm
        )

    def _end_field(self, fn, y, z, args, solver_state):
        tableau = _tableau(self.ode_solver)
        if tableau is not None and tableau.fsal and not tableau.implicit:
            _, field = solver_state
            return field
        return _vector_field(fn, y)(0.0, z, args)

    def _hand_over(self, solver_state, field):
        tableau = _tableau(self.ode_solver)
        if tableau is not None and tableau.fsal:
            return False, field
        return solver_state

    def _evaluations_per_step(self):
        solver = self.ode_solver
        tableau = _tableau(solver)
        if tableau is not None and not tableau.implicit:
            return tableau.num_stages + (-1 if tableau.fsal else 1)
        if type(solver) is dfx.Euler:
            return 1
        return None

    def _with_inner_tolerances(self, terms, state):
        solver = self.ode_solver
        if not isinstance(solver, dfx.AbstractImplicitSolver):
            return solver
        dtype = state.start.dtype
        root_finder = solver.root_finder
        scale = self.norm(state.field)
        tableau = _tableau(solver)
        if tableau is None or not tableau.fsal:
            scale = scale * (state.end - state.start)
        values = {"rtol": 0.0, "atol": 0.1 * scale, "norm": self.norm}
        names = [n for n in values if not _is_set(getattr(root_finder, n))]
        if names:
            root_finder = eqx.tree_at(
                lambda r: [getattr(r, n) for n in names],
                root_finder,
                [values[n] for n in names],
            )
            solver = eqx.tree_at(lambda s: s.root_finder, solver, root_finder)
        return solver


def _is_set(value: Any) -> bool:
    return eqx.is_array_like(value) or callable(value)


def _vector_field(fn, y, known=None, value=None):
    """`fn` as Diffrax calls it, in the working dtype.

    `value` is what it is at `known`.
    """
    dtype = working_dtype(y)

    def vector_field(t, z, args):
        del t
        if known is not None and all(
            a is b for a, b in zip(jtu.tree_leaves(z), jtu.tree_leaves(known))
        ):
            return value
        out, _ = fn(_cast_like(z, y), args)
        return _cast(out, dtype)

    return vector_field
