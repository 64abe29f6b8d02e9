from collections.abc import Callable

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar


class PseudoTransient(dfx.AbstractStepSizeController):
    """Steps made for a steady state."""

    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    theta: float = 0.3
    gmax: float = 2.0

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t1, y0, args, func, error_order
        return t0 + dt0, None

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        raise NotImplementedError

    def adapt_to_field(
        self, f0, f1, t0, t1, y0, y1, args, y_error, error_order, controller_state
    ):
        dt = t1 - t0
        step = self.norm(jtu.tree_map(jnp.subtract, y1, y0))
        err = self.norm(y_error)
        rel = err / (self.theta * step)
        r0 = self.norm(f0)
        r1 = self.norm(f1)
        q = r1 / r0
        finite = jnp.isfinite(err) & jnp.isfinite(r1)
        by_error = 0.9 * rel ** (-1.0 / error_order)
        by_residual = 1.0 / q
        keep = finite & ((q <= 1) | (rel <= 1))
        factor = jnp.where(q <= 0.5, jnp.maximum(by_error, by_residual), by_error)
        factor = jnp.clip(factor, 0.25, self.gmax)
        factor = jnp.where(keep, factor, jnp.minimum(factor, 0.5))
        factor = jnp.where(finite, factor, 0.25)
        dt = dt * factor.astype(dt.dtype)
        start = jnp.where(keep, t1, t0)
        return keep, start, start + dt, False, controller_state, dfx.RESULTS.successful
