import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._layers import batch_norm, conv, draw_convolutions, RELU
from .config import MDEQConfig


class Bottleneck(eqx.Module):
    """A residual block that leads to four times its inner channels."""

    layers: eqx.nn.Sequential
    shortcut: eqx.nn.Sequential

    def __init__(self, in_channels: int, inner_channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        out_channels = 4 * inner_channels
        self.layers = eqx.nn.Sequential(
            [
                conv(in_channels, inner_channels, 1, key=keys[0]),
                batch_norm(inner_channels, affine=False),
                RELU,
                conv(inner_channels, inner_channels, 3, key=keys[1]),
                batch_norm(inner_channels, affine=False),
                RELU,
                conv(inner_channels, out_channels, 1, key=keys[2]),
                batch_norm(out_channels, affine=False),
            ]
        )
        self.shortcut = eqx.nn.Sequential(
            []
            if in_channels == out_channels
            else [
                conv(in_channels, out_channels, 1, key=keys[3]),
                batch_norm(out_channels),
            ]
        )

    def __call__(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, "out height width"], eqx.nn.State]:
        """The larger features."""
        y, state = self.layers(x, state)
        x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ClassifierHead(eqx.Module):
    """From the finest scale to the coarsest, and then to the logits of an image."""

    bottlenecks: list[Bottleneck]
    downsamples: list[eqx.nn.Sequential]
    final: eqx.nn.Sequential
    linear: eqx.nn.Linear

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        bottleneck_key, down_key, final_key, linear_key, draw_key = jr.split(key, 5)
        num_scales = len(config.channels)
        self.bottlenecks = [
            Bottleneck(*sizes, key=key)
            for *sizes, key in zip(
                config.channels,
                config.head_channels,
                jr.split(bottleneck_key, num_scales),
                strict=True,
            )
        ]
        widths = [4 * channels for channels in config.head_channels]
        self.downsamples = [
            eqx.nn.Sequential(
                [
                    conv(width, next_width, 3, stride=2, use_bias=True, key=key),
                    batch_norm(next_width),
                    RELU,
                ]
            )
            for width, next_width, key in zip(
                widths, widths[1:], jr.split(down_key, num_scales)
            )
        ]
        self.final = eqx.nn.Sequential(
            [
                conv(
                    widths[-1], config.final_channels, 1, use_bias=True, key=final_key
                ),
                batch_norm(config.final_channels),
                RELU,
            ]
        )
        self.linear = eqx.nn.Linear(
            config.final_channels, config.num_classes, key=linear_key
        )
        self.bottlenecks, self.downsamples, self.final = draw_convolutions(
            (self.bottlenecks, self.downsamples, self.final),
            key=draw_key,
        )

    def __call__(
        self, z: tuple[Array, ...], state: eqx.nn.State
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        """The logits of an image."""
        y, state = self.bottlenecks[0](z[0], state)
        for leaf, bottleneck, downsample in zip(
            z[1:], self.bottlenecks[1:], self.downsamples, strict=True
        ):
            y, state = downsample(y, state)
            features, state = bottleneck(leaf, state)
            y = features + y
        y, state = self.final(y, state)
        return self.linear(jnp.mean(y, axis=(1, 2))), state


class SegmenterHead(eqx.Module):
    """All scales at the size of the finest, and then the logits of every pixel."""

    layers: eqx.nn.Sequential

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        key1, key2, draw_key = jr.split(key, 3)
        width = sum(config.channels)
        layers = [
            conv(width, width, 1, use_bias=True, key=key1),
            batch_norm(width),
            RELU,
            conv(width, config.num_classes, 1, use_bias=True, key=key2),
        ]
        layers = draw_convolutions(layers, key=draw_key)
        self.layers = eqx.nn.Sequential(layers)

    def __call__(
        self, z: tuple[Array, ...], state: eqx.nn.State
    ) -> tuple[Float[Array, "classes height width"], eqx.nn.State]:
        """The logits of every pixel of the finest scale."""
        _, height, width = z[0].shape
        scales = [resize(leaf, height, width) for leaf in z]
        return self.layers(jnp.concatenate(scales), state)


def resize(
    x: Float[Array, "channel _ _"], height: int, width: int
) -> Float[Array, "channel {height} {width}"]:
    """Bilinear interpolation that keeps the centres of the corner pixels in place."""
    for axis, size in ((1, height), (2, width)):
        old_size = x.shape[axis]
        position = jnp.linspace(0, old_size - 1, size, dtype=x.dtype)
        below = jnp.clip(jnp.floor(position).astype(int), 0, max(old_size - 2, 0))
        above = jnp.minimum(below + 1, old_size - 1)
        shape = [1, 1, 1]
        shape[axis] = size
        weight = (position - below.astype(x.dtype)).reshape(shape)
        lower, upper = jnp.take(x, below, axis), jnp.take(x, above, axis)
        x = lower + weight * (upper - lower)
    return x
