import dataclasses
from collections.abc import Callable
from typing import TypeVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork
from .._internal.checks import check_number, check_value, POSITIVE
from .._internal.types import Solver
from .._solver.anderson import AndersonAcceleration
from ._config import check_config, check_sizes, check_tuple
from ._layers import batch_norm, conv, draw_convolutions
from ._model import AbstractModel


_Norm = TypeVar("_Norm", eqx.nn.BatchNorm, eqx.nn.GroupNorm)


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
    gain: float = 1.0
    """What the weights of the normalisations behind the stem and behind `x + conv` in
    the cell start from. The louder these are next to the state, the stronger the cell
    contracts, and the fewer evaluations an equilibrium takes."""
    stride: int = 1
    """How far apart the pixels are that the stem keeps. With 2 the state has half the
    height and width, and the cell costs a quarter."""
    pool_size: int = 8
    """How high and wide the windows of the state are whose means the head sees."""
    pool_stride: int = 8
    """How far apart these windows are."""
    num_classes: int = 10
    """The number of logits."""

    def __post_init__(self):
        check_tuple(self, "image_shape", "three positive integers", 3)
        check_sizes(self, "channels", "inner_channels", "groups")
        check_sizes(self, "stride", "pool_size", "pool_stride", "num_classes")
        check_number(self, "gain", self.gain, POSITIVE)
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
        self.norm2 = _with_gain(eqx.nn.GroupNorm(config.groups, outer), config.gain)
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
    pool_size: int = eqx.field(static=True)
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
        self.stem = conv(
            *(in_channels, channels, 3),
            stride=config.stride,
            use_bias=True,
            key=stem_key,
        )
        self.stem_norm = _with_gain(batch_norm(channels), config.gain)
        self.deq = DeepEquilibriumNetwork(
            ResNetCell(config, key=cell_key),
            solver,
            init=init,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        self.head_norm = batch_norm(channels)
        self.pool_size, self.pool_stride = config.pool_size, config.pool_stride
        apart = config.stride * config.pool_stride
        num_windows = [-(-size // apart) for size in image_size]
        num_features = channels * num_windows[0] * num_windows[1]
        self.head = eqx.nn.Linear(num_features, config.num_classes, key=head_key)

    def inject(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, "channel2 height2 width2"], eqx.nn.State]:
        return self.stem_norm(self.stem(x), state)

    def read_out(
        self, z: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        z, state = self.head_norm(z, state)
        means = _average_pool(z, self.pool_size, self.pool_stride)
        return self.head(jnp.ravel(means)), state


def _with_gain(norm: _Norm, gain: float) -> _Norm:
    return eqx.tree_at(lambda norm: norm.weight, norm, replace_fn=lambda w: gain * w)


def _average_pool(
    x: Float[Array, "channel height width"], size: int, stride: int
) -> Float[Array, "channel _ _"]:
    window, strides = (1, size, size), (1, stride, stride)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / size**2
