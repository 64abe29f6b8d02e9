"""From which step on a solver accelerates the plain iteration."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Scalar

from .._internal.pytree import working_dtype
from .._internal.types import Y


# How alike residuals two steps apart have to be, or how opposite.
_ALIKE = 0.5

# Residuals of a contraction that is far from normal grow too, in the first steps.
_GROWTH = 1.5


class Onset(eqx.Module):
    r"""Whether the plain iteration is left yet.

    The least residual does not mean the least error: on a map that is far from normal
    the first accelerated steps shrink the residual by a third, and are further from the
    root than plain ones. What tells is $\langle r_k, r_{k-2}\rangle / |r_{k-1}|^2$. On
    plain steps $r_{k+1} = J r_k$, so that it is 1 if $J$ is symmetric or one mode is
    left, -1 if $J$ is skew, and about 0 if $J$ is random.

    **Attributes:**

    - `started`: whether an example has started to accelerate.
    - `residual_square`: of its last evaluation.
    """

    started: Bool[Array, ""]
    residual_square: Scalar

    def update(
        self,
        num_steps: Int[Array, ""],
        residual_square: Scalar,
        overlap: Scalar,
        warmup: int,
    ) -> "Onset":
        """After an evaluation; `overlap` is with the residual two steps before."""
        alike = jnp.abs(overlap) > _ALIKE * self.residual_square
        grows = residual_square > _GROWTH**2 * self.residual_square
        pays = (num_steps >= 2) & alike | (num_steps >= 1) & grows
        return Onset(self.started | pays | (num_steps >= warmup), residual_square)


def start_onset(y: Y) -> Onset:
    """Before the first evaluation."""
    return Onset(jnp.array(False), jnp.zeros((), working_dtype(y)))
