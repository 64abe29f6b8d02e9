import dataclasses
import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork, Solver
from .._internal.checks import check_hyperparameter
from .._multiscale import MultiScaleCell
from .._solver.broyden import Broyden
from ..nn import VariationalDropout, weight_norm
from ._init import draw_normal
from ._model import AbstractModel


@dataclasses.dataclass(frozen=True)
class MDEQConfig:
    """The sizes of a [`implicitnets.models.MDEQ`][] or an `MDEQSegmenter`.

    **Arguments:**

    - `channels`: of the state at each scale, from the finest to the coarsest, each of
        half the height and width of the one before. With a single scale there is
        nothing to fuse, and the cell is one residual block.
    - `head_channels`: a quarter of the channels of the classifier's head at each scale.
    - `final_channels`: of the classifier before its last layer.
    - `num_classes`: the number of logits.
    - `num_downsamples`: how many times the stem halves height and width.
    - `expansion`: how many times its outer channels a cell's block has inside.
    - `groups`: of the group normalisations.
    - `kernel_size`: of the convolutions of the blocks.
    - `dropout`: the probability with which a block drops a channel.
    - `normalise_weights`: whether the blocks and the last layers of the cell have
        weight normalisation.
    - `post_fuse_affine`: whether the last normalisations of the cell have weights.
    - `in_channels`: of an image.

    **Raises:**

    `ValueError` for sizes that do not go together.
    """

    channels: tuple[int, ...] = (24, 24)
    head_channels: tuple[int, ...] = (8, 16)
    final_channels: int = 200
    num_classes: int = 10
    num_downsamples: int = 0
    expansion: int = 5
    groups: int = 8
    kernel_size: int = 3
    dropout: float = 0.25
    normalise_weights: bool = True
    post_fuse_affine: bool = False
    in_channels: int = 3

    def __post_init__(self):
        check = ft.partial(check_hyperparameter, self)
        positive = min(self.channels, default=0) >= 1
        check("channels", positive, "positive, one for each of some scales")
        check(
            "head_channels",
            len(self.head_channels) == len(self.channels)
            and min(self.head_channels) >= 1,
            f"positive, one for each of the {len(self.channels)} scales",
        )
        for name in ("final_channels", "num_classes", "expansion", "in_channels"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("num_downsamples", self.num_downsamples >= 0, "at least 0")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        check("kernel_size", odd, "odd and positive")
        # Behind the fusion there are half as many groups.
        groups = [self.groups] + [self.groups // 2] * (len(self.channels) > 1)
        check(
            "groups",
            min(groups) >= 1
            and all(channels % n == 0 for channels in self.channels for n in groups),
            f"a divisor of all of the channels {self.channels}, and so must half of it "
            "if there are several scales",
        )

    @classmethod
    def cifar_tiny(cls) -> "MDEQConfig":
        """158,890 parameters, for CIFAR-10 without augmentation."""
        return cls()

    @classmethod
    def cifar_large(cls) -> "MDEQConfig":
        """11,097,438 parameters, for CIFAR-10."""
        return cls(
            channels=(32, 64, 128, 256),
            head_channels=(14, 28, 56, 112),
            final_channels=1680,
            dropout=0.3,
        )

    @classmethod
    def cifar_large_regularised(cls) -> "MDEQConfig":
        """That to train with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(cls.cifar_large(), dropout=0.22)

    @classmethod
    def imagenet_small(cls) -> "MDEQConfig":
        """16.8 million parameters."""
        return cls._imagenet((32, 64, 128, 256), (24, 48, 96, 192))

    @classmethod
    def imagenet_small_regularised(cls) -> "MDEQConfig":
        """That to train with [`implicitnets.jacobian_penalty`][], with a wider head."""
        return dataclasses.replace(
            cls.imagenet_small(),
            head_channels=(28, 56, 112, 224),
            dropout=0.02,
            post_fuse_affine=False,
        )

    @classmethod
    def imagenet_large(cls) -> "MDEQConfig":
        """67.1 million parameters."""
        return cls._imagenet((80, 160, 320, 640), (32, 64, 128, 256))

    @classmethod
    def imagenet_large_regularised(cls) -> "MDEQConfig":
        """That to train with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(cls.imagenet_large(), post_fuse_affine=False)

    @classmethod
    def imagenet_xl(cls) -> "MDEQConfig":
        """90.5 million parameters."""
        channels = (88, 176, 352, 704)
        return cls._imagenet(channels, (32, 64, 128, 256), expansion=6)

    @classmethod
    def cityscapes_small(cls) -> "MDEQConfig":
        """For an `MDEQSegmenter`."""
        config = cls.imagenet_small()
        return dataclasses.replace(config, num_classes=19, dropout=0.05)

    @classmethod
    def cityscapes_large(cls) -> "MDEQConfig":
        """For an `MDEQSegmenter`."""
        config = cls.imagenet_large()
        return dataclasses.replace(config, num_classes=19, dropout=0.03)

    @classmethod
    def cityscapes_xl(cls) -> "MDEQConfig":
        """For an `MDEQSegmenter`."""
        config = cls.imagenet_xl()
        return dataclasses.replace(config, num_classes=19, dropout=0.04)

    @classmethod
    def _imagenet(cls, channels, head_channels, expansion=5):
        return cls(
            channels=channels,
            head_channels=head_channels,
            final_channels=2048,
            num_classes=1000,
            num_downsamples=2,
            expansion=expansion,
            dropout=0.0,
            post_fuse_affine=True,
        )


def _conv(in_channels, out_channels, kernel_size, *, stride=1, use_bias=False, key):
    return eqx.nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        use_bias=use_bias,
        key=key,
    )


def _batch_norm(channels, affine=True):
    return eqx.nn.BatchNorm(
        channels,
        axis_name="batch",
        channelwise_affine=affine,
        momentum=0.9,
        mode="batch",
    )


_RELU = eqx.nn.Lambda(jax.nn.relu)


class ResidualBlock(eqx.Module):
    """What the cell does at one scale: a wide residual block that stays there.

    **Arguments:**

    - `channels`: of the scale.
    - `config`: the other sizes.
    - `key`: for the weights. Keyword only argument.
    """

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    dropout: VariationalDropout
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, channels: int, config: MDEQConfig, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        inner, kernel_size = config.expansion * channels, config.kernel_size
        self.conv1 = _conv(channels, inner, kernel_size, key=key1)
        self.norm1 = eqx.nn.GroupNorm(config.groups, inner)
        self.conv2 = _conv(inner, channels, kernel_size, key=key2)
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
    """Repeats every pixel.

    **Arguments:**

    - `factor`: how many times, in height and in width.
    """

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


def _mapping_layer(source, target, config, key):
    """From scale `source` to scale `target`."""
    in_channels, out_channels = config.channels[source], config.channels[target]
    if source == target:
        return eqx.nn.Identity()
    if source > target:
        return eqx.nn.Sequential(
            [
                _conv(in_channels, out_channels, 1, key=key),
                eqx.nn.GroupNorm(config.groups, out_channels),
                Upsample(2 ** (source - target)),
            ]
        )
    layers = []
    for scale, key in zip(range(source, target), jr.split(key, target - source)):
        is_last = scale == target - 1
        width = out_channels if is_last else in_channels
        layers += [
            _conv(in_channels, width, 3, stride=2, key=key),
            eqx.nn.GroupNorm(config.groups, width),
        ]
        if not is_last:
            layers += [_RELU]
    return eqx.nn.Sequential(layers)


def _post_fuse_layer(channels, config, key):
    norm = eqx.nn.GroupNorm(
        config.groups // 2, channels, channelwise_affine=config.post_fuse_affine
    )
    return eqx.nn.Sequential([_RELU, _conv(channels, channels, 1, key=key), norm])


class MDEQCell(eqx.Module):
    """Residual blocks at every scale, whose results are then fused across the scales.

    Its input is of the structure of the state, so that solves can start at zeros like
    it. It enters at the finest scale alone.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

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
        blocks, mapping, post_fuse = draw_normal(
            (blocks, mapping, post_fuse), eqx.nn.Conv2d, std=0.01, key=draw_key
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


class Stem(eqx.Module):
    """What the cell sees of an image: its features at the finest scale, and zeros.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

    layers: eqx.nn.Sequential
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        keys = iter(jr.split(key, config.num_downsamples + 4))
        width = config.channels[0]

        def block(in_channels, kernel_size, stride):
            return [
                _conv(in_channels, width, kernel_size, stride=stride, key=next(keys)),
                _batch_norm(width),
                _RELU,
            ]

        strides = [2] * config.num_downsamples
        first, second, *others = strides + [1] * max(0, 2 - len(strides))
        layers = block(config.in_channels, 3, first) + block(width, 3, second)
        for stride in others:
            layers += block(width, 3, stride)
        if config.num_downsamples > 0 or len(config.channels) > 2:
            layers += block(width, 1, 1)
        layers = draw_normal(layers, eqx.nn.Conv2d, std=0.01, key=next(keys))
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


class Bottleneck(eqx.Module):
    """A residual block that leads to four times its inner channels.

    **Arguments:**

    - `in_channels`, `inner_channels`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

    layers: eqx.nn.Sequential
    shortcut: eqx.nn.Sequential

    def __init__(self, in_channels: int, inner_channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        out_channels = 4 * inner_channels
        self.layers = eqx.nn.Sequential(
            [
                _conv(in_channels, inner_channels, 1, key=keys[0]),
                _batch_norm(inner_channels, affine=False),
                _RELU,
                _conv(inner_channels, inner_channels, 3, key=keys[1]),
                _batch_norm(inner_channels, affine=False),
                _RELU,
                _conv(inner_channels, out_channels, 1, key=keys[2]),
                _batch_norm(out_channels, affine=False),
            ]
        )
        self.shortcut = eqx.nn.Sequential(
            []
            if in_channels == out_channels
            else [
                _conv(in_channels, out_channels, 1, key=keys[3]),
                _batch_norm(out_channels),
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
    """From the finest scale to the coarsest, and then to the logits of an image.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

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
                    _conv(width, next_width, 3, stride=2, use_bias=True, key=key),
                    _batch_norm(next_width),
                    _RELU,
                ]
            )
            for width, next_width, key in zip(
                widths, widths[1:], jr.split(down_key, num_scales)
            )
        ]
        self.final = eqx.nn.Sequential(
            [
                _conv(
                    widths[-1], config.final_channels, 1, use_bias=True, key=final_key
                ),
                _batch_norm(config.final_channels),
                _RELU,
            ]
        )
        self.linear = eqx.nn.Linear(
            config.final_channels, config.num_classes, key=linear_key
        )
        self.bottlenecks, self.downsamples, self.final = draw_normal(
            (self.bottlenecks, self.downsamples, self.final),
            eqx.nn.Conv2d,
            std=0.01,
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
    """All scales at the size of the finest, and then the logits of every pixel.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

    layers: eqx.nn.Sequential

    def __init__(self, config: MDEQConfig, *, key: PRNGKeyArray):
        key1, key2, draw_key = jr.split(key, 3)
        width = sum(config.channels)
        layers = [
            _conv(width, width, 1, use_bias=True, key=key1),
            _batch_norm(width),
            _RELU,
            _conv(width, config.num_classes, 1, use_bias=True, key=key2),
        ]
        layers = draw_normal(layers, eqx.nn.Conv2d, std=0.01, key=draw_key)
        self.layers = eqx.nn.Sequential(layers)

    def __call__(
        self, z: tuple[Array, ...], state: eqx.nn.State
    ) -> tuple[Float[Array, "classes height width"], eqx.nn.State]:
        """The logits of every pixel of the finest scale."""
        _, height, width = z[0].shape
        z = [_resize(leaf, height, width) for leaf in z]
        return self.layers(jnp.concatenate(z), state)


def _resize(x, height, width):
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


# Eighteen steps are what the models are trained with on CIFAR-10.
_SOLVER = Broyden(rtol=1e-3, atol=1e-6)
_MAX_STEPS = 18


def _make_deq(config, solver, adjoint, max_steps, *, key):
    cell = MDEQCell(config, key=key)
    return DeepEquilibriumNetwork(cell, solver, adjoint=adjoint, max_steps=max_steps)


class MDEQ(AbstractModel):
    """A multiscale equilibrium network that classifies images.

    Bai et al., *Multiscale Deep Equilibrium Models*, 2020.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: Stem
    deq: AbstractDeepEquilibriumNetwork
    head: ClassifierHead

    def __init__(
        self,
        config: MDEQConfig,
        solver: Solver | dfx.AbstractSolver = _SOLVER,
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = _MAX_STEPS,
        key: PRNGKeyArray,
    ):
        stem_key, cell_key, head_key = jr.split(key, 3)
        self.stem = Stem(config, key=stem_key)
        self.deq = _make_deq(config, solver, adjoint, max_steps, key=cell_key)
        self.head = ClassifierHead(config, key=head_key)

    def inject(self, x, state):
        return self.stem(x, state)

    def read_out(self, z, state):
        return self.head(z, state)


class MDEQSegmenter(AbstractModel):
    """A multiscale equilibrium network that classifies every pixel of an image.

    Its logits have the size of the finest scale. Bai et al., *Multiscale Deep
    Equilibrium Models*, 2020.

    **Arguments:**

    - `config`: the sizes; those of the classifier's head count for nothing.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: Stem
    deq: AbstractDeepEquilibriumNetwork
    head: SegmenterHead

    def __init__(
        self,
        config: MDEQConfig,
        solver: Solver | dfx.AbstractSolver = _SOLVER,
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = _MAX_STEPS,
        key: PRNGKeyArray,
    ):
        stem_key, cell_key, head_key = jr.split(key, 3)
        self.stem = Stem(config, key=stem_key)
        self.deq = _make_deq(config, solver, adjoint, max_steps, key=cell_key)
        self.head = SegmenterHead(config, key=head_key)

    def inject(self, x, state):
        return self.stem(x, state)

    def read_out(self, z, state):
        return self.head(z, state)
