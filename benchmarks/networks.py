"""The models in the one form that the training script knows.

A network reads one example and says its loss; batches come from `jax.vmap` with the
axis name `batch`.
"""

import abc
import dataclasses
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from data import Data, DataError
from equilibrium import EquilibriumOptions, make_layer
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tutorial import mnist

import implicitnets as inn
from implicitnets import models


class Verdict(eqx.Module):
    """What came of one example.

    **Attributes:**

    - `loss`, `prediction`: of every target.
    - `solution`: of the equilibrium layer.
    - `injection`: what its cell had as second argument.
    - `memory`: what the next segment of a text is to remember; of other data, `None`.
    """

    loss: Float[Array, "..."]
    prediction: Int[Array, "..."]
    solution: inn.EquilibriumSolution
    injection: PyTree
    memory: PyTree


class AbstractNetwork(eqx.Module):
    """A model with one equilibrium layer."""

    @property
    @abc.abstractmethod
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""

    @property
    @abc.abstractmethod
    def memory(self) -> PyTree[Array]:
        """What there is to remember before a text begins."""

    @abc.abstractmethod
    def __call__(
        self,
        inputs: Array,
        targets: Int[Array, "..."],
        memory: PyTree[Array],
        state: eqx.nn.State,
        *,
        key: PRNGKeyArray,
    ) -> tuple[Verdict, eqx.nn.State]:
        """Judge one example.

        **Arguments:**

        - `inputs`, `targets`: the example.
        - `memory`: of the segment before.
        - `state`: the statistics of batch normalisation.
        - `key`: for dropout. Keyword only argument.

        **Returns:**

        The verdict, and the new state.
        """


def judge(
    logits: Float[Array, "... classes"],
    targets: Int[Array, "..."],
    solution: inn.EquilibriumSolution,
    injection: PyTree,
    memory: PyTree[Array] = None,
) -> Verdict:
    """The verdict on the scores of all the classes."""
    known = jnp.maximum(targets, 0)  # An ignored one has a loss too, that counts not.
    return Verdict(
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, known),
        prediction=jnp.argmax(logits, axis=-1),
        solution=solution,
        injection=injection,
        memory=memory,
    )


class ImageNetwork(AbstractNetwork):
    """A model of the library that judges an image, or every pixel of one."""

    model: models.MDEQ | models.MDEQSegmenter | models.ResNetDEQ | models.TanhDEQ

    @property
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""
        return self.model.deq

    @property
    def memory(self) -> None:
        """Nothing."""
        return None

    def __call__(self, inputs, targets, memory, state, *, key):
        """Judge one image."""
        injection, state = self.model.inject(inputs, state)
        solution = self.model.deq.solve(injection, key=key)
        logits, state = self.model.read_out(solution.z_star, state)
        if targets.ndim == 2:
            # Of every pixel of the finest scale, which may be smaller than the image.
            size = (len(logits), *targets.shape)
            logits = jnp.moveaxis(jax.image.resize(logits, size, "bilinear"), 0, -1)
        return judge(logits, targets, solution, injection, memory), state


class TutorialNetwork(AbstractNetwork):
    """The tutorial's convolutional classifier."""

    model: mnist.Classifier

    @property
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""
        return self.model.deq

    @property
    def memory(self) -> None:
        """Nothing."""
        return None

    def __call__(self, inputs, targets, memory, state, *, key):
        """Judge one image."""
        injection = self.model.stem(inputs)
        solution = self.model.deq.solve(injection, key=key)
        logits = self.model.head(solution.z_star)
        return judge(logits, targets, solution, injection, memory), state


@dataclasses.dataclass(frozen=True)
class TutorialOptions:
    """The tutorial's network."""

    model_type: mnist.ModelType = "deq"
    """Where a solve starts: at zero, at a trained guess, at the cell's own guess."""
    channels: int = 64
    """Channels of the cell."""

    def build(self, data: Data, *, key: PRNGKeyArray) -> TutorialNetwork:
        """The network for some data."""
        channels, size, _ = _image_shape(data)
        if channels != 1:
            raise DataError("The tutorial's network takes grey images.")
        config = mnist.Config(model_type=self.model_type, channels=self.channels)
        model = mnist.Classifier(config, size, data.num_classes, key=key)
        return TutorialNetwork(model)


@dataclasses.dataclass(frozen=True)
class TanhOptions:
    """The multilayer perceptron."""

    width: int = 100
    """Size of the state."""

    def build(self, data: Data, *, key: PRNGKeyArray) -> ImageNetwork:
        """The network for some data."""
        config = models.TanhConfig(_image_shape(data), self.width, data.num_classes)
        return ImageNetwork(models.TanhDEQ(config, key=key))


@dataclasses.dataclass(frozen=True)
class ResNetOptions:
    """The residual network."""

    channels: int = 48
    """Channels of the state."""
    inner_channels: int = 64
    """Channels between the two convolutions of the cell."""
    groups: int = 8
    """Of the group normalisations."""
    pool_stride: int = 8
    """How far apart the means over 8 x 8 pixels are that the head sees."""

    def build(self, data: Data, *, key: PRNGKeyArray) -> ImageNetwork:
        """The network for some data."""
        config = models.ResNetConfig(
            image_shape=_image_shape(data),
            num_classes=data.num_classes,
            **dataclasses.asdict(self),
        )
        return ImageNetwork(models.ResNetDEQ(config, key=key))


@dataclasses.dataclass(frozen=True)
class MDEQOptions:
    """The multiscale network, that classifies images, or their pixels if the data has
    masks."""

    channels: tuple[int, ...] = (24, 24)
    """Channels of the state at every scale, from the finest to the coarsest."""
    head_channels: tuple[int, ...] = (8, 16)
    """A quarter of the channels of the classifier's head at every scale."""
    final_channels: int = 200
    """Channels of the classifier before its last layer."""
    num_downsamples: int = 0
    """How often the stem halves height and width."""
    expansion: int = 5
    """How many times its outer channels a cell's block has inside."""
    groups: int = 8
    """Of the group normalisations."""
    dropout: float = 0.25
    """Probability with which a block drops a channel."""
    normalise_weights: bool = True
    """Weight normalisation in the cell."""
    post_fuse_affine: bool = False
    """Weights of the cell's last normalisations."""

    @classmethod
    def of(cls, config: models.MDEQConfig) -> "MDEQOptions":
        """Published sizes."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})

    def build(self, data: Data, *, key: PRNGKeyArray) -> ImageNetwork:
        """The network for some data."""
        channels, height, width = _image_shape(data)
        multiple = 2 ** (self.num_downsamples + len(self.channels) - 1)
        if height % multiple or width % multiple:
            raise DataError(
                f"The scales need images whose sides are multiples of {multiple}; "
                f"these have {height} x {width} pixels."
            )
        config = models.MDEQConfig(
            in_channels=channels,
            num_classes=data.num_classes,
            **dataclasses.asdict(self),
        )
        has_masks = data.target_shape != ()
        model = models.MDEQSegmenter if has_masks else models.MDEQ
        return ImageNetwork(model(config, key=key))


def _image_shape(data: Data) -> tuple[int, int, int]:
    if len(data.input_shape) != 3:
        raise DataError("The model takes images.")
    return data.input_shape


ModelOptions: TypeAlias = TutorialOptions | TanhOptions | ResNetOptions | MDEQOptions


def build(
    options: ModelOptions,
    equilibrium: EquilibriumOptions,
    data: Data,
    *,
    key: PRNGKeyArray,
) -> tuple[AbstractNetwork, eqx.nn.State]:
    """A network with fresh weights, and its state.

    **Arguments:**

    - `options`: which model.
    - `equilibrium`: its solver and adjoint.
    - `data`: what it is to learn.
    - `key`: for the weights. Keyword only argument.

    **Raises:**

    `DataError` if the model and the data do not fit.
    """
    network, state = eqx.nn.make_with_state(options.build)(data, key=key)
    layer = make_layer(network.layer, equilibrium)
    return eqx.tree_at(lambda network: network.layer, network, layer), state
