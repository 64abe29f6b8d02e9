import dataclasses
import math

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork
from .._internal.types import Solver
from .._solver.anderson import AndersonAcceleration
from ._config import check_config, check_sizes, check_tuple
from ._model import AbstractModel


@dataclasses.dataclass(frozen=True)
class TanhConfig:
    """The sizes of a [`implicitnets.models.TanhDEQ`][].

    The defaults are those of the notebook: 89,510 parameters.

    **Raises:**

    `ValueError` for sizes that are not positive integers.
    """

    image_shape: tuple[int, ...] = (1, 28, 28)
    """The shape of an example."""
    width: int = 100
    """How wide the state is."""
    num_classes: int = 10
    """The number of logits."""

    def __post_init__(self):
        check_tuple(self, "image_shape", "positive integers")
        check_sizes(self, "width", "num_classes")


class TanhCell(eqx.Module):
    """The cell `tanh(W z + x)`."""

    linear: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.linear = eqx.nn.Linear(width, width, use_bias=False, key=key)

    def __call__(
        self, z: Float[Array, " width"], x: Float[Array, " width"]
    ) -> Float[Array, " width"]:
        """The next state."""
        return jnp.tanh(self.linear(z) + x)


class TanhDEQ(AbstractModel):
    """A multilayer perceptron whose hidden layer is an equilibrium.

    The smallest of the models, and the one to read first.

    Kolter, Duvenaud and Johnson, *Deep Implicit Layers*, chapter 1, 2020.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: eqx.nn.Linear
    deq: AbstractDeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(
        self,
        config: TanhConfig,
        solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-4, 1e-6),
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 200,
        key: PRNGKeyArray,
    ):
        check_config(self, config, TanhConfig)
        stem_key, cell_key, head_key = jr.split(key, 3)
        width = config.width
        self.stem = eqx.nn.Linear(math.prod(config.image_shape), width, key=stem_key)
        self.deq = DeepEquilibriumNetwork(
            TanhCell(width, key=cell_key), solver, adjoint=adjoint, max_steps=max_steps
        )
        self.head = eqx.nn.Linear(width, config.num_classes, key=head_key)

    def inject(
        self, x: Float[Array, "..."], state: eqx.nn.State
    ) -> tuple[Float[Array, " width"], eqx.nn.State]:
        return self.stem(jnp.ravel(x)), state

    def read_out(
        self, z: Float[Array, " width"], state: eqx.nn.State
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        return self.head(z), state
