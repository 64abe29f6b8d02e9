import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ..._multiscale import MultiScaleCell
from ...nn import VariationalDropout, weight_norm
from .._layers import conv, draw_convolutions, RELU
from .config import MDEQConfig


class ResidualBlock(eqx.Module):
    """What the cell does at one scale: a wide residual block that stays there."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    dropout: VariationalDropout
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, channels: int, config: MDEQConfig, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        inner, kernel_size = config.expansion * channels, config.kernel_size
        self.conv1 = conv(channels, inner, kernel_size, key=key1)
        self.norm1 = eqx.nn.GroupNorm(config.groups, inner)
        self.conv2 = conv(inner, channels, kernel_size, key=key2)
        self.dropout = VariationalDropout(config.dropout, shared_axes=(1, 2))
        self.norm2 = eqx.nn.GroupNorm(config.groups, channels)
        self.norm3 = eqx.nn.GroupNorm(config.groups, channels)

    def __call__(
        self,
        z: Float[Array, "channel height width"],
        x: Float[Array, "channel height width"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "channel height width"]:
        """The next state of the scale; `x` is the input, at the finest one."""
        y = jax.nn.relu(self.norm1(self.conv1(z)))
        y = self.dropout(self.conv2(y), key=key)
        y = self.norm2(y if x is None else y + x)
        return self.norm3(jax.nn.relu(y + z))


class Upsample(eqx.Module):
    """Repeats every pixel."""

    factor: int = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "channel height width"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "channel _ _"]:
        """The larger image."""
        del key
        channels, height, width = x.shape
        x = jnp.broadcast_to(
            x[:, :, None, :, None],
            (channels, height, self.factor, width, self.factor),
        )
        return x.reshape(channels, height * self.factor, width * self.factor)


def _mapping_layer(
    source: int, target: int, config: MDEQConfig, key: PRNGKeyArray
) -> eqx.nn.Sequential | eqx.nn.Identity:
    """From scale `source` to scale `target`."""
    in_channels, out_channels = config.channels[source], config.channels[target]
    if source == target:
        return eqx.nn.Identity()
    if source > target:
        return eqx.nn.Sequential(
            [
                conv(in_channels, out_channels, 1, key=key),
                eqx.nn.GroupNorm(config.groups, out_channels),
                Upsample(2 ** (source - target)),
            ]
        )
    layers = []
    for scale, key in zip(range(source, target), jr.split(key, target - source)):
        is_last = scale == target - 1
        width = out_channels if is_last else in_channels
        layers += [
            conv(in_channels, width, 3, stride=2, key=key),
            eqx.nn.GroupNorm(config.groups, width),
        ]
        if not is_last:
            layers += [RELU]
    return eqx.nn.Sequential(layers)


def _post_fuse_layer(
    channels: int, config: MDEQConfig, key: PRNGKeyArray
) -> eqx.nn.Sequential:
    norm = eqx.nn.GroupNorm(
        config.groups // 2, channels, channelwise_affine=config.post_fuse_affine
    )
    return eqx.nn.Sequential([RELU, conv(channels, channels, 1, key=key), norm])


class MDEQCell(eqx.Module):
    """Residual blocks at every scale, whose results are then fused across scales."""

    # Its input has the structure of the state, so that solves can start at zeros like
    # it, or at the input itself. The cell sees the finest scale of it alone.

    layers: MultiScaleCell

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        block_key, mapping_key, post_fuse_key, draw_key = jr.split(key, 4)
        num_scales = len(config.channels)
        blocks = [
            ResidualBlock(channels, config, key=key)
            for channels, key in zip(config.channels, jr.split(block_key, num_scales))
        ]
        mapping_keys = jr.split(mapping_key, (num_scales, num_scales))
        mapping = [
            [
                _mapping_layer(source, target, config, mapping_keys[source, target])
                for target in range(num_scales)
            ]
            for source in range(num_scales)
        ]
        post_fuse = None  # of a single scale
        if num_scales > 1:
            post_fuse = [
                _post_fuse_layer(channels, config, key)
                for channels, key in zip(
                    config.channels, jr.split(post_fuse_key, num_scales)
                )
            ]
        blocks, mapping, post_fuse = draw_convolutions(
            (blocks, mapping, post_fuse), key=draw_key
        )
        if config.normalise_weights:
            blocks, post_fuse = weight_norm((blocks, post_fuse), eqx.nn.Conv2d)
        self.layers = MultiScaleCell(blocks, mapping, post_fuse)

    def __call__(
        self,
        z: tuple[Array, ...],
        x: tuple[Array, ...],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, ...]:
        """The next state."""
        return self.layers(z, x[0], key=key)
