import dataclasses
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork, Solver
from .._internal.checks import check_value
from .._solver.anderson import AndersonAcceleration
from ._config import check_config, check_sizes, check_tuple
from ._layers import batch_norm, conv, draw_convolutions
from ._model import AbstractModel


_POOL_SIZE = 8


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The sizes of a [`implicitnets.models.ResNetDEQ`][].

    The defaults are those of the notebook on CIFAR-10: 64,842 parameters.

    **Raises:**

    `ValueError` for sizes that are not positive integers, or do not go together.
    """

    image_shape: tuple[int, int, int] = (3, 32, 32)
    """The channels, height and width of an example."""
    channels: int = 48
    """How many channels the state has."""
    inner_channels: int = 64
    """How many channels the cell has between its two convolutions."""
    groups: int = 8
    """How many groups each group normalisation of the cell has."""
    pool_stride: int = _POOL_SIZE
    """How far apart the windows of 8 x 8 pixels are whose means the head sees."""
    num_classes: int = 10
    """The number of logits."""

    def __post_init__(self):
        check_tuple(self, "image_shape", "three positive integers", 3)
        check_sizes(self, "channels", "inner_channels", "groups")
        check_sizes(self, "pool_stride", "num_classes")
        channels = self.channels, self.inner_channels
        check_value(
            self,
            "groups",
            self.groups,
            all(number % self.groups == 0 for number in channels),
            "a divisor of the channels {} and {}".format(*channels),
        )

    @classmethod
    def jaxopt(
        cls,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        net_width: int = 1,
        num_classes: int = 10,
    ) -> "ResNetConfig":
        """The `FullDEQ` of JAXopt's example, whose head sees overlapping windows.

        **Arguments:**

        - `image_shape`, `num_classes`: as above.
        - `net_width`: how many times 24 channels the state has.

        **Returns:**

        A configuration.
        """
        return cls(
            image_shape=image_shape,
            channels=24 * net_width,
            inner_channels=32 * net_width,
            pool_stride=1,
            num_classes=num_classes,
        )


class ResNetCell(eqx.Module):
    """`norm(relu(z + norm(x + conv(norm(relu(conv(z)))))))`, with group norms."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, config: ResNetConfig, *, key: PRNGKeyArray):
        key1, key2, draw_key = jr.split(key, 3)
        outer, inner = config.channels, config.inner_channels
        convs = conv(outer, inner, 3, key=key1), conv(inner, outer, 3, key=key2)
        self.conv1, self.conv2 = draw_convolutions(convs, key=draw_key)
        self.norm1 = eqx.nn.GroupNorm(config.groups, inner)
        self.norm2 = eqx.nn.GroupNorm(config.groups, outer)
        self.norm3 = eqx.nn.GroupNorm(config.groups, outer)

    def __call__(
        self,
        z: Float[Array, "channel height width"],
        x: Float[Array, "channel height width"],
    ) -> Float[Array, "channel height width"]:
        """The next state."""
        y = self.norm1(jax.nn.relu(self.conv1(z)))
        y = self.norm2(x + self.conv2(y))
        return self.norm3(jax.nn.relu(z + y))


class ResNetDEQ(AbstractModel):
    """A convolutional classifier of infinitely many equal residual blocks.

    Kolter, Duvenaud and Johnson, *Deep Implicit Layers*, chapter 4, 2020; and JAXopt's
    example of a deep equilibrium model, which starts its solve at the input instead of
    at zero: give it `init=lambda x: x`.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `init`, `adjoint`, `max_steps`: as
        [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: eqx.nn.Conv2d
    stem_norm: eqx.nn.BatchNorm
    deq: AbstractDeepEquilibriumNetwork
    head_norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    pool_stride: int = eqx.field(static=True)

    def __init__(
        self,
        config: ResNetConfig,
        solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-2, 1e-6),
        *,
        init: Callable[[Array], Array] | None = None,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 25,
        key: PRNGKeyArray,
    ):
        check_config(self, config, ResNetConfig)
        stem_key, cell_key, head_key = jr.split(key, 3)
        in_channels, *image_size = config.image_shape
        channels = config.channels
        self.stem = conv(in_channels, channels, 3, use_bias=True, key=stem_key)
        self.stem_norm = batch_norm(channels)
        self.deq = DeepEquilibriumNetwork(
            ResNetCell(config, key=cell_key),
            solver,
            init=init,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        self.head_norm = batch_norm(channels)
        self.pool_stride = config.pool_stride
        num_windows = [-(-size // config.pool_stride) for size in image_size]
        num_features = channels * num_windows[0] * num_windows[1]
        self.head = eqx.nn.Linear(num_features, config.num_classes, key=head_key)

    def inject(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, "channel2 height width"], eqx.nn.State]:
        return self.stem_norm(self.stem(x), state)

    def read_out(
        self, z: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        z, state = self.head_norm(z, state)
        return self.head(jnp.ravel(_average_pool(z, self.pool_stride))), state


def _average_pool(
    x: Float[Array, "channel height width"], stride: int
) -> Float[Array, "channel _ _"]:
    window, strides = (1, _POOL_SIZE, _POOL_SIZE), (1, stride, stride)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / _POOL_SIZE**2
