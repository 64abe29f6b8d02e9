import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._layers import batch_norm, conv, draw_convolutions, RELU
from .config import MDEQConfig


class Stem(eqx.Module):
    """What the cell sees of an image: its features at the finest scale, and zeros."""

    layers: eqx.nn.Sequential
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        keys = iter(jr.split(key, config.num_downsamples + 4))
        width = config.channels[0]

        def block(in_channels, kernel_size, stride):
            return [
                conv(in_channels, width, kernel_size, stride=stride, key=next(keys)),
                batch_norm(width),
                RELU,
            ]

        strides = [2] * config.num_downsamples
        first, second, *others = strides + [1] * max(0, 2 - len(strides))
        layers = block(config.in_channels, 3, first) + block(width, 3, second)
        for stride in others:
            layers += block(width, 3, stride)
        if config.num_downsamples > 0 or len(config.channels) > 2:
            layers += block(width, 1, 1)
        layers = draw_convolutions(layers, key=next(keys))
        self.layers = eqx.nn.Sequential(layers)
        self.channels = config.channels

    def __call__(
        self, image: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[tuple[Array, ...], eqx.nn.State]:
        """The input of the cell, of the structure of its state."""
        x, state = self.layers(image, state)
        _, height, width = x.shape
        coarsest = 2 ** (len(self.channels) - 1)
        if height % coarsest != 0 or width % coarsest != 0:
            raise ValueError(
                f"The finest of {len(self.channels)} scales must have a height and a "
                f"width that are multiples of {coarsest}; got {height} x {width}."
            )
        zeros = (
            jnp.zeros((channels, height // 2**i, width // 2**i), x.dtype)
            for i, channels in enumerate(self.channels[1:], start=1)
        )
        return (x, *zeros), state
