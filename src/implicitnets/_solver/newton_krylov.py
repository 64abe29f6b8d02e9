from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar, ScalarLike

from .._internal.checks import (
    check_integer,
    check_number,
    check_part,
    check_stopping_rule,
    integer,
    LINEAR_SOLVER,
    PROPER_FRACTION,
)
from .._internal.loop import SolverState
from .._internal.pytree import (
    tree_all_finite,
    tree_cast_like,
    tree_dot,
    working_dtype,
)
from .._internal.results import promote
from .._internal.types import Answer, Aux, Norm, Tags, Verdict, Y
from .._linear_solver.gmres import GivensGMRES
from .._linear_solver.solve import (
    linear_operator,
    run_linear_solver,
)
from .abstract import AbstractSolver, Problem
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

# With a memory: how often a step may shrink before the whole one is taken, and how
# often that may happen.
_MAX_BACKTRACKS = 1
_MAX_ESCAPES = 30


class _Kept(eqx.Module):
    progress: Progress
    accepted_norms: Float[Array, " memory"]
    step_size: Scalar
    forcing: Scalar
    num_backtracks: Int[Array, ""]
    num_escapes: Int[Array, ""]
    failed: Bool[Array, ""]
    linear_result: optx.RESULTS
    num_rejected_steps: Int[Array, ""]
    num_matvecs: Int[Array, ""]


class _Free(eqx.Module):
    accepted: Y
    direction: Y


class NewtonKrylov(AbstractSolver[_Kept, _Free], optx.AbstractRootFinder):
    """Inexact Newton iteration with a Krylov method, globalised by backtracking.

    Every step linearises once, which also evaluates. If the residual has decreased
    enough, the step is accepted and the linear system is solved for the next one, only
    as accurately as the residual's decrease so far makes worthwhile. Otherwise the step
    is shortened, to between a tenth and a half, where a parabola through the residual
    norms has its minimum.

    Stops when `norm(F(z)) <= atol + rtol * norm(F(z) + z)`, which for the root
    `F(z) = f(z) - z` of a fixed-point problem is the rule of
    [`implicitnets.AndersonAcceleration`][]. The rule is checked on an iterate that was
    evaluated. A solve that stops before it holds returns the iterate after the best
    one, which a Newton step has led to. It ends as unsuccessful if no step
    decreases the residual any more: with the linear solver's result if that failed,
    with `nonfinite` if the function's values there were not finite, otherwise with
    `stagnation`. It also ends so where rounding has stopped it, as
    [`implicitnets.AndersonAcceleration`][] does.

    The statistics are `num_steps` (linearisations: the Newton steps, the shortened ones
    and the last check), `num_rejected_steps` (how many of them led to where the
    residual had not decreased enough), `nfe` (evaluations, one a step), and, with a
    linear solver that counts its products as [`implicitnets.GivensGMRES`][] does,
    `num_matvecs` (products with the Jacobian).

    Eisenstat and Walker, *Choosing the Forcing Terms in an Inexact Newton Method*,
    1996: choice 2 with its safeguard, and algorithm INB. Kelley, *Solving Nonlinear
    Equations with Newton's Method*, 2003, for the safeguard against solving the last
    system too accurately and for the parabola. Grippo, Lampariello and Lucidi, *A
    Nonmonotone Line Search Technique for Newton's Method*, 1986, for `memory`.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule. The line search uses the two-norm, which is
        what the linear solver decreases.
    - `linear_solver`: any Lineax solver. If it has an `rtol`, every step sets that. Its
        other fields are used as they are.
    - `forcing`: the first and the largest relative tolerance of a linear solve.
    - `memory`: with how many of the last residuals a step's is compared. With 1 it has
        to be less than the last one, and a solve may come to rest where the residual is
        least and not zero, as it often does on maps that expand. With more it has to be
        less than the largest of them, and a step that is rejected twice is taken whole,
        up to thirty times. The residual may then grow for a while, and from a poor
        start it may grow without end.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    linear_solver: lx.AbstractLinearSolver = GivensGMRES(rtol=0.5, atol=0.0)
    forcing: ScalarLike = 0.5
    memory: int = integer(1)

    def __check_init__(self):
        check_stopping_rule(self)
        check_part(self, "linear_solver", self.linear_solver, LINEAR_SOLVER)
        check_number(self, "forcing", self.forcing, PROPER_FRACTION)
        check_integer(self, "memory", self.memory, 1)

    def _start(self, problem: Problem, y: Y) -> tuple[_Kept, _Free]:
        del problem
        dtype = working_dtype(y)
        kept = _Kept(
            progress=start_progress(y),
            accepted_norms=jnp.full(self.memory, jnp.inf, dtype),
            step_size=jnp.array(1, dtype),
            forcing=jnp.asarray(self.forcing, dtype),
            num_backtracks=jnp.array(0),
            num_escapes=jnp.array(0),
            failed=jnp.array(False),
            linear_result=optx.RESULTS.successful,
            num_rejected_steps=jnp.array(0),
            num_matvecs=jnp.array(0),
        )
        return kept, _Free(accepted=y, direction=_zeros(y))

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[_Kept, _Free]
    ) -> tuple[Y, _Kept, _Free, Aux]:
        kept, free = state.kept, state.free.value

        def evaluate(z):
            residual, aux = problem(z)
            return tree_cast_like(residual, z), aux

        residual, jacobian, aux = jax.linearize(evaluate, y, has_aux=True)
        f = jtu.tree_map(jnp.add, y, residual)
        progress = self._judge(kept.progress, y, f, residual)
        residual_norm = jnp.sqrt(tree_dot(residual, residual))
        promised = kept.step_size * (1 - kept.forcing)
        reference = jnp.max(kept.accepted_norms)
        sufficient = (1 - _SUFFICIENT_DECREASE * promised) * reference
        escape = self._is_too_often(kept.num_backtracks)
        accept = progress.finite & ((residual_norm <= sufficient) | escape)

        # An example that is done, or has to try a shorter step, has nothing to solve.
        # It gets the system of zeros, so that the rest of a batch need not wait for it.
        solve = accept & ~progress.converged & ~kept.failed
        forcing = self._next_forcing(kept, progress, residual_norm)
        solution, linear_result, num_matvecs = self._solve(
            jacobian,
            _where(solve, jtu.tree_map(jnp.negative, residual), _zeros(y)),
            problem.tags,
            forcing,
        )

        accepted = _where(accept, y, free.accepted)
        direction = _where(accept, solution, free.direction)
        shortened = kept.step_size * self._shrinkage(kept, progress, residual_norm)
        # A step to where the function has no value may shrink as often as it takes.
        rejected = ~accept & progress.finite
        num_backtracks = kept.num_backtracks + jnp.where(rejected, 1, 0)
        num_backtracks = jnp.where(accept, 0, num_backtracks)
        give_up = rejected & self._is_too_often(num_backtracks)
        step_size = jnp.where(accept | give_up, 1, shortened)
        dtype = step_size.dtype
        new_y = jtu.tree_map(
            lambda a, d: a + (step_size * d.astype(dtype)).astype(a.dtype),
            accepted,
            direction,
        )
        num_escapes = kept.num_escapes + jnp.where(accept & escape, 1, 0)
        usable = tree_all_finite(new_y) & ~_equal(new_y, accepted)
        usable &= num_escapes <= _MAX_ESCAPES
        new_y = _where(usable, new_y, accepted)
        new_kept = _Kept(
            progress=progress,
            accepted_norms=self._remember(kept, accept, escape, residual_norm),
            step_size=step_size,
            forcing=jnp.where(accept, forcing, kept.forcing),
            num_backtracks=num_backtracks,
            num_escapes=num_escapes,
            failed=~usable,
            linear_result=optx.RESULTS.where(
                solve, promote(linear_result, optx.RESULTS), kept.linear_result
            ),
            num_rejected_steps=kept.num_rejected_steps
            + jnp.where(accept | progress.converged, 0, 1),
            num_matvecs=kept.num_matvecs + num_matvecs,
        )
        return new_y, new_kept, _Free(accepted, direction), aux

    def _is_too_often(self, num_backtracks: Int[Array, ""]) -> Bool[Array, ""]:
        return (num_backtracks > _MAX_BACKTRACKS) & (self.memory > 1)

    def _remember(
        self,
        kept: _Kept,
        accept: Bool[Array, ""],
        escape: Bool[Array, ""],
        residual_norm: Scalar,
    ) -> Float[Array, " memory"]:
        # The newest is the first. Where a solve has escaped to, it starts anew; so
        # does the first step of all, which any residual is a decrease for.
        old = kept.accepted_norms
        is_first = jnp.isinf(old[0])
        old = jnp.where(escape | is_first, residual_norm, old)
        newer = jnp.concatenate([residual_norm[None], old[:-1]])
        return jnp.where(accept, newer, kept.accepted_norms)

    def _next_forcing(
        self, kept: _Kept, progress: Progress, residual_norm: Scalar
    ) -> Scalar:
        dtype = residual_norm.dtype
        largest = jnp.asarray(self.forcing, dtype)
        ratio = residual_norm / kept.accepted_norms[0]
        forcing = _FORCING_FACTOR * ratio**2
        floor = _FORCING_FACTOR * kept.forcing**2
        floor = jnp.where(floor > _FORCING_SAFEGUARD, floor, 0)
        forcing = jnp.maximum(forcing, floor)
        # No more accurate than the stopping rule asks for.
        tolerance = jnp.asarray(self.rtol, dtype) + jnp.asarray(self.atol, dtype)
        forcing = jnp.maximum(forcing, 0.5 * tolerance / progress.error)
        is_first = jnp.isinf(kept.accepted_norms[0])
        return jnp.where(is_first, largest, jnp.minimum(forcing, largest))

    def _solve(
        self, jacobian: Callable, vector: Y, tags: Tags, forcing: Scalar
    ) -> tuple[Y, lx.RESULTS, Int[Array, ""] | int]:
        solver: Any = self.linear_solver
        if hasattr(solver, "rtol"):
            # Lineax solvers do not differentiate with respect to their fields.
            forcing = jax.lax.stop_gradient(forcing)
            solver = eqx.tree_at(lambda s: s.rtol, solver, forcing)

        def solve(product, vector):
            operator = linear_operator(product, vector, tags)
            value, result, stats = run_linear_solver(operator, vector, solver)
            return value, (result, stats["num_steps"] if self._counts_products else 0)

        # Unrolling the steps differentiates it.
        value, (result, num_matvecs) = jax.lax.custom_linear_solve(
            jacobian, vector, solve, transpose_solve=solve, has_aux=True
        )
        return value, result, num_matvecs

    @property
    def _counts_products(self) -> bool:
        return getattr(self.linear_solver, "counts_products", False)

    def _shrinkage(
        self, kept: _Kept, progress: Progress, residual_norm: Scalar
    ) -> Scalar:
        # The minimum of the parabola with the squared norms at both ends of the step,
        # and the slope at its start that an exact Newton direction has.
        size = kept.step_size
        ratio = (residual_norm / kept.accepted_norms[0]) ** 2
        shrinkage = size / (ratio - 1 + 2 * size)
        shrinkage = jnp.clip(shrinkage, _MOST_SHRINKAGE, _LEAST_SHRINKAGE)
        return jnp.where(progress.finite, shrinkage, _MOST_SHRINKAGE)

    def _verdict(self, kept: _Kept) -> Verdict:
        converged = kept.progress.converged & kept.progress.finite
        stagnation: Any = optx.RESULTS.stagnation  # Its type says that it is Lineax's.
        at_floor = kept.progress.at_floor
        failure = optx.RESULTS.where(
            at_floor | (kept.linear_result == optx.RESULTS.successful),
            stagnation,
            kept.linear_result,
        )
        failure = optx.RESULTS.where(
            kept.progress.finite, failure, optx.RESULTS.nonfinite
        )
        result = optx.RESULTS.where(
            (kept.failed | at_floor) & ~converged, failure, optx.RESULTS.successful
        )
        return converged, result

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: _Kept) -> Answer:
        del problem
        stats = {
            "nfe": kept.progress.num_evaluations,
            "num_rejected_steps": kept.num_rejected_steps,
        }
        if self._counts_products:
            stats["num_matvecs"] = kept.num_matvecs
        return kept.progress.answer(y), aux, stats


def _where(pred: Bool[Array, ""], x: Y, y: Y) -> Y:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


def _zeros(x: Y) -> Y:
    return jtu.tree_map(jnp.zeros_like, x)


def _equal(x: Y, y: Y) -> Bool[Array, ""]:
    same = jtu.tree_map(lambda a, b: jnp.all(a == b), x, y)
    return jnp.stack(jtu.tree_leaves(same)).all()
