from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_hyperparameter,
    check_number,
    check_options,
    check_tolerances,
)
from .._internal.loop import Unfrozen
from .._internal.pytree import tree_all_finite, tree_dot, working_dtype
from .._linear_solver.gmres import GivensGMRES
from .progress import Progress, start_progress


# Eisenstat and Walker's second choice of the forcing term, and from which value on a
# term may not fall faster than it predicts from the last one.
_FORCING_FACTOR = 0.9
_FORCING_SAFEGUARD = 0.1

# The share of the decrease that the linear model promises which a step must deliver.
_SUFFICIENT_DECREASE = 1e-4

# By how much a rejected step may shrink.
_LEAST_SHRINKAGE = 0.5
_MOST_SHRINKAGE = 0.1


class _NewtonKrylovState(eqx.Module):
    progress: Progress
    accepted_norm: Scalar
    step_size: Scalar
    forcing: Scalar
    failed: Bool[Array, ""]
    linear_result: optx.RESULTS
    num_rejected_steps: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    accepted: Unfrozen[PyTree[Array]]
    direction: Unfrozen[PyTree[Array]]


class NewtonKrylov(optx.AbstractRootFinder):
    """Inexact Newton iteration with a Krylov method, globalised by backtracking.

    Every step linearises once, which also evaluates. If the residual has decreased
    enough, the step is accepted and the linear system is solved for the next one: only
    as accurately as the residual's decrease so far makes worthwhile. Otherwise the step
    is shortened, to between a tenth and a half, where a parabola through the residual
    norms has its least.

    Stops when `norm(F(z)) <= atol + rtol * norm(F(z) + z)`, which for the root
    `F(z) = f(z) - z` of a fixed-point problem is the rule of
    [`implicitnets.AndersonAcceleration`][]. Checked on an iterate that was evaluated,
    and the best one is returned. A solve ends as unsuccessful if no step decreases the
    residual any more: with the linear solver's result if that failed, else with
    `stagnation`, or with `nonfinite` if the function's values there were.

    The statistics are `num_steps` (linearisations: the Newton steps, the shortened ones
    and the last check), `num_rejected_steps` (how many of them led to where the
    residual had not decreased enough), `nfe` (evaluations, one a step), and for
    `GivensGMRES` `num_matvecs` (products with the Jacobian).

    Eisenstat and Walker, *Choosing the Forcing Terms in an Inexact Newton Method*,
    1996: choice 2 with its safeguard, and algorithm INB. Kelley, *Solving Nonlinear
    Equations with Newton's Method*, 2003, for the safeguard against solving the last
    system too accurately and for the line search.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule. The line search uses the two-norm, which is
        what the linear solver decreases.
    - `linear_solver`: any Lineax solver. Of a [`implicitnets.GivensGMRES`][] every step
        sets the relative tolerance; any other is used as it is.
    - `forcing`: the first and the largest relative tolerance of a linear solve.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    linear_solver: lx.AbstractLinearSolver = GivensGMRES(rtol=0.5, atol=0.0)
    forcing: ScalarLike = 0.5

    def __check_init__(self):
        check_tolerances(self)
        check_hyperparameter(
            self,
            "linear_solver",
            isinstance(self.linear_solver, lx.AbstractLinearSolver),
            "a Lineax solver",
        )
        check_number(self, "forcing", lambda x: 0 < x < 1, "in the interval (0, 1)")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, aux_struct, tags
        check_options(self, options)
        if jax.eval_shape(lambda: y) != f_struct:
            raise ValueError(
                "`NewtonKrylov` is for functions whose value has the structure, shapes "
                f"and dtypes of their argument; got {f_struct} for "
                f"{jax.eval_shape(lambda: y)}."
            )
        dtype = working_dtype(y)
        return _NewtonKrylovState(
            progress=start_progress(y),
            accepted_norm=jnp.array(jnp.inf, dtype),
            step_size=jnp.array(1, dtype),
            forcing=jnp.asarray(self.forcing, dtype),
            failed=jnp.array(False),
            linear_result=optx.RESULTS.successful,
            num_rejected_steps=jnp.array(0),
            num_matvecs=jnp.array(0),
            accepted=Unfrozen(y),
            direction=Unfrozen(jtu.tree_map(jnp.zeros_like, y)),
        )

    def step(self, fn, y, args, options, state, tags):
        del options
        residual, jacobian, aux = jax.linearize(lambda z: fn(z, args), y, has_aux=True)
        f = jtu.tree_map(jnp.add, y, residual)
        progress = state.progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )
        residual_norm = jnp.sqrt(tree_dot(residual, residual))
        promised = state.step_size * (1 - state.forcing)
        sufficient = (1 - _SUFFICIENT_DECREASE * promised) * state.accepted_norm
        accept = progress.finite & (residual_norm <= sufficient)

        # Who is done, and who has to try a shorter step, has nothing to solve, and is
        # not to keep the rest of a batch waiting.
        solve = accept & ~progress.converged & ~state.failed
        forcing = self._next_forcing(state, progress, residual_norm)
        solution, linear_result, num_matvecs = self._solve(
            jacobian, _where(solve, _negative(residual), _zeros(y)), tags, forcing
        )

        accepted = _where(accept, y, state.accepted.value)
        direction = _where(accept, solution, state.direction.value)
        shortened = state.step_size * self._shrinkage(state, progress, residual_norm)
        step_size = jnp.where(accept, 1, shortened)
        dtype = step_size.dtype
        new_y = jtu.tree_map(
            lambda a, d: a + (step_size * d.astype(dtype)).astype(a.dtype),
            accepted,
            direction,
        )
        usable = tree_all_finite(new_y) & ~_equal(new_y, accepted)
        new_state = _NewtonKrylovState(
            progress=progress,
            accepted_norm=jnp.where(accept, residual_norm, state.accepted_norm),
            step_size=step_size,
            forcing=jnp.where(accept, forcing, state.forcing),
            failed=~usable,
            linear_result=optx.RESULTS.where(
                solve, optx.RESULTS.promote(linear_result), state.linear_result
            ),
            num_rejected_steps=state.num_rejected_steps
            + jnp.where(accept | progress.converged, 0, 1),
            num_matvecs=state.num_matvecs + num_matvecs,
            accepted=Unfrozen(accepted),
            direction=Unfrozen(direction),
        )
        return _where(usable, new_y, accepted), new_state, aux

    def _next_forcing(self, state, progress, residual_norm):
        dtype = residual_norm.dtype
        largest = jnp.asarray(self.forcing, dtype)
        ratio = residual_norm / state.accepted_norm
        forcing = _FORCING_FACTOR * ratio**2
        floor = _FORCING_FACTOR * state.forcing**2
        floor = jnp.where(floor > _FORCING_SAFEGUARD, floor, 0)
        forcing = jnp.maximum(forcing, floor)
        # No more accurate than the stopping rule asks for.
        tolerance = jnp.asarray(self.rtol, dtype) + jnp.asarray(self.atol, dtype)
        forcing = jnp.maximum(forcing, 0.5 * tolerance / progress.error)
        is_first = jnp.isinf(state.accepted_norm)
        return jnp.where(is_first, largest, jnp.minimum(forcing, largest))

    def _solve(self, jacobian, vector, tags, forcing):
        solver = self.linear_solver
        sets_tolerance = isinstance(solver, GivensGMRES)
        if sets_tolerance:
            # Lineax solvers do not differentiate with respect to their fields.
            forcing = jax.lax.stop_gradient(forcing)
            solver = eqx.tree_at(lambda s: s.rtol, solver, forcing)
        structure = jax.eval_shape(lambda: vector)
        operator = lx.FunctionLinearOperator(jacobian, structure, tags)
        solution = lx.linear_solve(operator, vector, solver, throw=False)
        num_matvecs = solution.stats["num_steps"] if sets_tolerance else 0
        return solution.value, solution.result, num_matvecs

    def _shrinkage(self, state, progress, residual_norm):
        # The least of the parabola with the squared norms at both ends of the step, and
        # the slope at its start that an exact Newton direction has.
        size = state.step_size
        ratio = (residual_norm / state.accepted_norm) ** 2
        shrinkage = size / (ratio - 1 + 2 * size)
        shrinkage = jnp.clip(shrinkage, _MOST_SHRINKAGE, _LEAST_SHRINKAGE)
        return jnp.where(progress.finite, shrinkage, _MOST_SHRINKAGE)

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        converged = state.progress.converged & state.progress.finite
        stagnation: Any = optx.RESULTS.stagnation  # typed as Lineax', whence it comes
        failure = optx.RESULTS.where(
            state.linear_result == optx.RESULTS.successful,
            stagnation,
            state.linear_result,
        )
        failure = optx.RESULTS.where(
            state.progress.finite, failure, optx.RESULTS.nonfinite
        )
        result = optx.RESULTS.where(
            state.failed & ~converged, failure, optx.RESULTS.successful
        )
        return converged, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, y, args, options, tags, result
        stats = {
            "nfe": state.progress.num_evaluations,
            "num_rejected_steps": state.num_rejected_steps,
        }
        if isinstance(self.linear_solver, GivensGMRES):
            stats["num_matvecs"] = state.num_matvecs
        return state.progress.best_y, aux, stats


def _where(pred: Bool[Array, ""], x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


def _zeros(x: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.zeros_like, x)


def _negative(x: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.negative, x)


def _equal(x: PyTree[Array], y: PyTree[Array]) -> Bool[Array, ""]:
    same = jtu.tree_map(lambda a, b: jnp.all(a == b), x, y)
    return jnp.stack(jtu.tree_leaves(same)).all()
