import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._internal.pytree import tree_astype, working_dtype


_Y = TypeVar("_Y", bound=PyTree[Array])

# The iterate after one that is further than this from the best one is no better guess.
_ASTRAY = 2.0

# A solve is at its rounding floor if a quarter of its evaluations have been idle since
# the error last fell by this factor, and the iterates have not got away from the best
# one. Rounding makes steps of about a residual to and fro, or a random walk. Where the
# residual falls slowly, or rests for a while, the steps add up.
_FALL = 0.7
_FEWEST_IDLE = 8
_IDLE_SHARE = 0.25
_RANDOM_WALK = 0.5

# What counts as idle: no new best iterate, but about as good a one (a solver that is
# far from the best one is on its way), and a residual that is small relative to the
# value (no map is expected to be less exact than that).
_NEAR = 7.0
_SMALL = 0.01

# Anderson and Broyden recover from excursions of one or two orders of magnitude; a
# solve that is three off does not.
_DIVERGENCE_FACTOR = 1e3


def divergence_bound(f: PyTree[Array], residual_norm: Scalar, f_norm: Scalar) -> Scalar:
    """The residual norm from which a solve that starts here counts as diverged."""
    # The norm of ones is for a start close to an unstable point, as zero is for
    # `tanh(2 z)`. The solve leaves it as one that diverges does, by a constant factor a
    # step, but its equilibrium is at the scale of one.
    ones_norm = math.sqrt(sum(leaf.size for leaf in jtu.tree_leaves(f)))
    scale = jnp.maximum(jnp.maximum(residual_norm, f_norm), ones_norm)
    return _DIVERGENCE_FACTOR * scale


class Progress(eqx.Module, Generic[_Y]):
    """What every solver here keeps: its best evaluated iterate, and its verdict.

    The stopping rule is `norm(f(z) - z) <= atol + rtol * norm(f(z))`. Iterates are
    ranked by the residual norm in units of the right-hand side, so that an iterate for
    which the rule holds is the best one.

    **Attributes:**

    - `best_y`: the best iterate evaluated so far; never one with a non-finite residual.
    - `best_error`: its residual norm in units of the tolerance's scale.
    - `error`: that of the newest evaluation.
    - `divergence_bound`: the residual norm from which the solve counts as diverged.
    - `converged`, `diverged`, `finite`: the verdict on the newest evaluation.
    - `num_evaluations`: how many evaluations there were.
    - `reference_error`: the error when it last fell by much.
    - `num_idle`: how many evaluations since then made no progress.
    - `wandering`: the sum of their distances from the best iterate, each in units of
        its residual.
    """

    best_y: _Y
    best_error: Scalar
    error: Scalar
    divergence_bound: Scalar
    converged: Bool[Array, ""]
    diverged: Bool[Array, ""]
    finite: Bool[Array, ""]
    num_evaluations: Int[Array, ""]
    reference_error: Scalar
    num_idle: Int[Array, ""]
    wandering: Scalar

    def update(
        self,
        y: _Y,
        f: _Y,
        residual: _Y,
        *,
        rtol: ScalarLike,
        atol: ScalarLike,
        norm: Callable[[PyTree[Array]], Scalar],
    ) -> "Progress[_Y]":
        """With the evaluation of the map at `y` taken into account."""
        dtype = self.error.dtype
        rtol = jnp.asarray(rtol, dtype)
        atol = jnp.asarray(atol, dtype)
        residual_norm = norm(tree_astype(residual, dtype)).astype(dtype)
        f_norm = norm(tree_astype(f, dtype)).astype(dtype)
        tolerance = atol + rtol
        # In these units the rule reads `error <= atol + rtol`, and the error is the
        # relative residual if `atol = 0`, the absolute one if `rtol = 0` or if both are
        # (a solve for all of `max_steps`).
        unit = jnp.where(
            tolerance > 0,
            (atol + rtol * f_norm) / jnp.where(tolerance > 0, tolerance, 1),
            1,
        )
        error = jnp.where(residual_norm == 0, 0, residual_norm / unit)
        bound = jnp.where(
            jnp.isinf(self.divergence_bound),
            divergence_bound(f, residual_norm, f_norm),
            self.divergence_bound,
        )
        better = error < self.best_error
        # With no tolerance a solve is for all of `max_steps`.
        idle = ~better & (error <= _NEAR * self.best_error) & (tolerance > 0)
        idle &= (residual_norm > 0) & (residual_norm <= _SMALL * f_norm)
        fallen = error < _FALL * self.reference_error
        distance = norm(_distance(y, self.best_y, dtype)).astype(dtype)
        strayed = distance / lax.stop_gradient(jnp.where(idle, residual_norm, 1))
        return Progress(
            best_y=jtu.tree_map(
                lambda new, old: jnp.where(better, new, old), y, self.best_y
            ),
            best_error=jnp.where(better, error, self.best_error),
            error=error,
            divergence_bound=bound,
            converged=error <= tolerance,
            diverged=residual_norm > bound,
            finite=jnp.isfinite(residual_norm + f_norm),
            num_evaluations=self.num_evaluations + 1,
            reference_error=jnp.where(fallen, error, self.reference_error),
            num_idle=jnp.where(fallen, 0, self.num_idle + jnp.where(idle, 1, 0)),
            wandering=jnp.where(
                fallen, 0, self.wandering + jnp.where(idle, strayed, 0)
            ),
        )

    @property
    def at_floor(self) -> Bool[Array, ""]:
        """Whether what is left of the residual is rounding."""
        dtype = self.wandering.dtype
        num_idle = self.num_idle.astype(dtype)
        enough = _IDLE_SHARE * self.num_evaluations.astype(dtype)
        enough = jnp.maximum(enough, _FEWEST_IDLE)
        return (num_idle >= enough) & (self.wandering <= _RANDOM_WALK * num_idle**1.5)

    def answer(self, next_y: _Y) -> _Y:
        """The best that the evaluations allow, at the end of a solve.

        Where the stopping rule holds, it is the iterate that it was checked on. What
        the newest evaluation has found out is otherwise in the next iterate, unless it
        is rounding.
        """
        on_course = self.finite & ~self.diverged & ~self.at_floor
        on_course &= self.error <= _ASTRAY * self.best_error
        go_on = on_course & ~self.converged
        return jtu.tree_map(
            lambda new, best: jnp.where(go_on, new, best), next_y, self.best_y
        )

    def verdict(
        self, stuck: Bool[Array, ""] | bool = False
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """What `terminate` returns; `stuck` if the solver has no way to go on."""
        converged = self.converged & self.finite
        stuck = stuck | self.at_floor
        stagnation: Any = optx.RESULTS.stagnation  # Its type says that it is Lineax's.
        result = optx.RESULTS.where(
            stuck & ~converged, stagnation, optx.RESULTS.successful
        )
        result = optx.RESULTS.where(
            self.diverged, optx.RESULTS.nonlinear_divergence, result
        )
        result = optx.RESULTS.where(self.finite, result, optx.RESULTS.nonfinite)
        return converged, result


def start_progress(y: _Y) -> Progress[_Y]:
    """The progress of a solve that has evaluated nothing yet."""
    infinity = jnp.array(jnp.inf, working_dtype(y))
    return Progress(
        best_y=y,
        best_error=infinity,
        error=infinity,
        divergence_bound=infinity,
        converged=jnp.array(False),
        diverged=jnp.array(False),
        finite=jnp.array(True),
        num_evaluations=jnp.array(0),
        reference_error=infinity,
        num_idle=jnp.array(0),
        wandering=jnp.zeros_like(infinity),
    )


def _distance(x: _Y, y: _Y, dtype: Any) -> PyTree[Array]:
    x, y = lax.stop_gradient((tree_astype(x, dtype), tree_astype(y, dtype)))
    return jtu.tree_map(jnp.subtract, x, y)
