from collections.abc import Callable

import diffrax as dfx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar

from .._misc import check_hyperparameter


class PseudoTransient(dfx.AbstractStepSizeController):
    """A step-size controller made for steady states, where the path does not matter.

    A controller with tolerances asks for the same accuracy all along the path. The
    state comes to rest while its step size rests at the limit of stability, and so the
    residual of an explicit solver hovers at the tolerance for ever. This one relates
    the local error of a step to the motion in that step: what is stiff may be as wrong
    as it likes as long as it decays as fast as everything else. So the step size
    settles where the fastest mode decays at the rate of the slowest, which is the best
    that a step size can do, at whatever distance from the steady state.

    With `limit = (norm(y1 - y0) / norm(error)) ** (1 / error_order)`, which is how many
    times as long the step could have been until it is all error, the next step is
    `safety * limit` times as long, within the bounds of `factormin` and `factormax`. A
    step that should have been less than half as long is rejected and made again.

    Works in `diffrax.diffeqsolve` too (without tolerances of its own, so give them to
    `diffrax.steady_state_event`).

    **Arguments:**

    - `safety`: the step size to use, as a fraction of that limit. Infinity lets the
        step size grow by `factormax` for as long as the steps succeed, which suits the
        implicit solvers: they are stable at any step size and turn into Newton's method
        (this is pseudo-transient continuation in its usual form).
    - `factormin`, `factormax`: the least and the most that a step size may change by in
        a step. A step that failed is made again with `factormin` times its size.
    - `dtmax`: the largest step size.
    - `norm`: measures the motion and the error.

    ??? cite "References"

        The growing step sizes are those of

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

    safety: float = 0.5
    factormin: float = 0.25
    factormax: float = 2.0
    dtmax: float = 1e6
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm

    def __check_init__(self):
        bounds = {
            "safety": (lambda x: x > 0, "positive"),
            "factormin": (lambda x: 0 < x < 1, "between 0 and 1"),
            "factormax": (lambda x: x >= 1, "at least 1"),
            "dtmax": (lambda x: x > 0, "positive"),
        }
        for name, (is_valid, allowed) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, int | float):
                check_hyperparameter(self, name, is_valid(value), allowed)

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t1, y0, args, func, error_order
        # The time scale of `dz/dt = f(z) - z` is 1.
        return t0 + (1.0 if dt0 is None else dt0), None

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        del args
        if y_error is None or error_order is None:
            raise ValueError(
                "`PseudoTransient` needs a solver that estimates its error and knows "
                "its order."
            )
        # Not a differentiable function where the error is zero, and not worth being one
        # anywhere else.
        y0, y1, y_error = lax.stop_gradient((y0, y1_candidate, y_error))
        motion = self.norm(jtu.tree_map(jnp.subtract, y1, y0))
        error = self.norm(y_error)
        limit = jnp.where(error == 0, jnp.inf, (motion / error) ** (1 / error_order))
        # Also where it is NaN, for what has overflowed.
        factor = jnp.where(limit > 0, self.safety * limit, 0)
        keep = factor >= 0.5
        factor = jnp.clip(factor, self.factormin, self.factormax)
        dt = jnp.minimum((t1 - t0) * factor.astype(t1.dtype), self.dtmax)
        start = jnp.where(keep, t1, t0)
        return keep, start, start + dt, False, controller_state, dfx.RESULTS.successful
