from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_number,
    check_part,
    FUNCTION,
    POSITIVE,
    PROPER_FRACTION,
    Range,
)
from .._internal.types import RealScalarLike


class PseudoTransient(dfx.AbstractStepSizeController):
    """A step-size controller made for steady states, where the path does not matter.

    A controller with tolerances asks for the same accuracy all along the path. As the
    state comes to rest, the step size stays at the limit of stability, and the residual
    of an explicit solver hovers at the tolerance for ever. This controller compares the
    local error of a step with the motion in that step: a fast mode may be as wrong as
    it likes if it decays as fast as everything else. So the step size settles where the
    fastest mode decays at the rate of the slowest, which is the best that a step size
    can do, at any distance from the steady state.

    The step could have been
    `limit = (norm(y1 - y0) / norm(error)) ** (1 / error_order)` times as long until it
    is all error. The next step is `safety * limit` times as long, within the bounds of
    `factormin` and `factormax`. A step that should have been less than half as long is
    rejected and made again.

    An implicit solver is stable at any step size, and large steps make it Newton's
    method. [`implicitnets.SteadyState`][] knows the residual. There the steps of an
    implicit solver also grow by the factor by which the residual falls, if that is more
    (switched evolution relaxation), and do not grow while the residual does.

    It takes about as many evaluations as the best constant step size, and fewer than
    `diffrax.PIDController`. The best constant step size depends on the problem, and
    larger steps do not converge.

    Works in `diffrax.diffeqsolve` too (where `diffrax.steady_state_event` then needs
    tolerances of its own).

    **Arguments:**

    - `safety`: the step size to use, as a fraction of that limit.
    - `factormin`, `factormax`: the least and the most that the step size is multiplied
        by in a step. A step that failed is made again with `factormin` times its size.
    - `norm`: measures the motion and the error.

    ??? cite "References"

        Switched evolution relaxation, and why it converges:

        ```bibtex
        @article{kelley1998convergence,
          title={Convergence analysis of pseudo-transient continuation},
          author={Kelley, C. T. and Keyes, David E.},
          journal={SIAM Journal on Numerical Analysis},
          volume={35},
          number={2},
          pages={508--523},
          year={1998}
        }
        ```
    """

    safety: ScalarLike = 0.5
    factormin: ScalarLike = 0.25
    factormax: ScalarLike = 2.0
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm

    def __check_init__(self):
        check_number(self, "safety", self.safety, POSITIVE)
        check_number(self, "factormin", self.factormin, PROPER_FRACTION)
        growth = Range("a number larger than 1", lambda x: x > 1)
        check_number(self, "factormax", self.factormax, growth)
        check_part(self, "norm", self.norm, FUNCTION)

    def wrap(self, direction: RealScalarLike) -> "PseudoTransient":
        del direction
        return self

    def init(
        self,
        terms: PyTree,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree[Array],
        dt0: RealScalarLike | None,
        args: Any,
        func: Callable,
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, None]:
        del terms, t1, y0, args, func, error_order
        # The time scale of `dz/dt = f(z) - z` is 1.
        return t0 + (1.0 if dt0 is None else dt0), None

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree[Array],
        y1_candidate: PyTree[Array],
        args: Any,
        y_error: PyTree[Array] | None,
        error_order: RealScalarLike | None,
        controller_state: None,
    ) -> tuple[Bool[Array, ""], Scalar, Scalar, bool, None, dfx.RESULTS]:
        del args
        factor = self._error_factor(y0, y1_candidate, y_error, error_order)
        keep, start, end = self._scale_step(t0, t1, factor)
        return keep, start, end, False, controller_state, dfx.RESULTS.successful

    def adapt_to_growth(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree[Array],
        y1_candidate: PyTree[Array],
        y_error: PyTree[Array] | None,
        error_order: RealScalarLike | None,
        growth: Scalar,
    ) -> tuple[Bool[Array, ""], Scalar, Scalar]:
        """As `adapt_step_size`, for an implicit solver, which is stable at any step.

        **Arguments:**

        - `t0`, `t1`, `y0`, `y1_candidate`, `y_error`, `error_order`: as there.
        - `growth`: the norm of the residual at the end of the step over that at its
            start.

        **Returns:**

        Whether to accept the step, and the start and the end of the next one.
        """
        factor = self._error_factor(y0, y1_candidate, y_error, error_order)
        # A small error is no reason for larger steps while the residual grows: far from
        # the path the error estimate of a stiff problem says little.
        factor = jnp.where(growth > 1, jnp.minimum(factor, 1), factor)
        failed = ~jnp.isfinite(self.norm(y_error))
        factor = jnp.where(failed, 0, jnp.maximum(factor, 1 / growth))
        return self._scale_step(t0, t1, factor)

    def _error_factor(
        self,
        y0: PyTree[Array],
        y1: PyTree[Array],
        y_error: PyTree[Array] | None,
        error_order: RealScalarLike | None,
    ) -> Scalar:
        if y_error is None or error_order is None:
            raise ValueError(
                "`PseudoTransient` needs a solver that estimates its error and knows "
                "its order."
            )
        # Not differentiable where the error is zero, and not worth it elsewhere.
        y0, y1, y_error = lax.stop_gradient((y0, y1, y_error))
        motion = self.norm(jtu.tree_map(jnp.subtract, y1, y0))
        error = self.norm(y_error)
        limit = jnp.where(error == 0, jnp.inf, (motion / error) ** (1 / error_order))
        return limit * self.safety

    def _scale_step(
        self, t0: RealScalarLike, t1: RealScalarLike, factor: Scalar
    ) -> tuple[Bool[Array, ""], Scalar, Scalar]:
        # Also where it is NaN.
        factor = jnp.where(factor > 0, factor, 0).astype(jnp.result_type(t1))
        keep = factor >= 0.5
        start = jnp.where(keep, t1, t0)
        dt = (t1 - t0) * jnp.clip(factor, self.factormin, self.factormax)
        return keep, start, start + dt
