import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._internal.pytree import tree_astype, working_dtype


_Y = TypeVar("_Y", bound=PyTree[Array])

# The iterate after one that is further than this from the best one is no better guess.
_ASTRAY = 2.0

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
    """

    best_y: _Y
    best_error: Scalar
    error: Scalar
    divergence_bound: Scalar
    converged: Bool[Array, ""]
    diverged: Bool[Array, ""]
    finite: Bool[Array, ""]
    num_evaluations: Int[Array, ""]

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
        )

    def answer(self, next_y: _Y) -> _Y:
        """The best that the evaluations allow, at the end of a solve.

        Where the stopping rule holds, it is the iterate that it was checked on. What
        the newest evaluation has found out is otherwise in the next iterate.
        """
        on_course = self.finite & ~self.diverged
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
    )
