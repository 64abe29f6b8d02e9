from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._internal.checks import (
    check_integer,
    check_number,
    check_part,
    FUNCTION,
    PROPER_FRACTION,
)
from .._internal.parametrise import AbstractParametrisation, resolve
from ._infinity_norm import InfinityNorm


class WellPosedCell(eqx.Module):
    r"""The cell $\phi(A z + B x + b)$ of implicit deep learning, with one equilibrium.

    [`implicitnets.nn.InfinityNorm`][] bounds the infinity-norm of $A$ below one, and
    $\phi$ acts on every entry without expanding. So the cell is a contraction: every
    input has exactly one equilibrium, and plain iteration converges to it by the factor
    `bound` in each step.

    El Ghaoui et al., *Implicit Deep Learning*, 2021, section 2.2.

    **Arguments:**

    - `in_size`: the size of the input, a vector.
    - `size`: the size of the state, a vector.
    - `bound`: the bound of the infinity-norm, below one. Keyword only argument.
    - `activation`: $\phi$, any function of single entries with slopes between minus one
        and one. Keyword only argument.
    - `dtype`: the dtype of the parameters; `None` for JAX' default. Keyword only
        argument.
    - `key`: for the initialisation. Keyword only argument.

    **Raises:**

    `ValueError` if the bound is not in the interval (0, 1) or a size is not positive;
    `TypeError` if the activation is not a function.
    """

    weight: Array | AbstractParametrisation
    injection: eqx.nn.Linear
    activation: Callable[[Array], Array]

    def __init__(
        self,
        in_size: int,
        size: int,
        *,
        bound: float = 0.95,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: type | jnp.dtype | None = None,
        key: PRNGKeyArray,
    ):
        in_size = check_integer(self, "in_size", in_size, 1)
        size = check_integer(self, "size", size, 1)
        check_number(self, "bound", bound, PROPER_FRACTION)
        check_part(self, "activation", activation, FUNCTION)
        dtype = jnp.result_type(float) if dtype is None else dtype
        weight_key, injection_key = jr.split(key)
        weight = jr.normal(weight_key, (size, size), dtype) / size
        self.weight = InfinityNorm(weight, bound)
        self.injection = eqx.nn.Linear(in_size, size, dtype=dtype, key=injection_key)
        self.activation = activation

    def __call__(
        self, z: Float[Array, " size"], x: Float[Array, " in_size"]
    ) -> Float[Array, " size"]:
        """The next state.

        **Arguments:**

        - `z`: the state.
        - `x`: the input.

        **Returns:**

        The next state.
        """
        return self.activation(resolve(self.weight) @ z + self.injection(x))
