"""The models in the one form that the training script knows.

A network reads one example and says its loss; batches come from `jax.vmap` with the
axis name `batch`.
"""

import abc
import dataclasses
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import implicitnets as inn
from implicitnets import models

from ..tutorial import mnist
from .data import Data, DataError
from .equilibrium import EquilibriumOptions, make_layer
from .errors import OptionError


class Verdict(eqx.Module):
    """What came of one example.

    **Attributes:**

    - `loss`, `prediction`: of every target.
    - `solution`: of the equilibrium layer.
    - `injection`, `key`: what its cell had besides the state.
    - `memory`: what the next segment of a text is to remember; of other data, `None`.
    """

    loss: Float[Array, "..."]
    prediction: Int[Array, "..."]
    solution: inn.EquilibriumSolution
    injection: PyTree
    key: PRNGKeyArray
    memory: PyTree[Array]


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


def num_parameters(network: AbstractNetwork) -> int:
    """How many weights a network has."""
    weights = eqx.filter(network, eqx.is_inexact_array)
    return sum(leaf.size for leaf in jtu.tree_leaves(weights))


def judge(
    logits: Float[Array, "... classes"],
    targets: Int[Array, "..."],
    solution: inn.EquilibriumSolution,
    injection: PyTree,
    key: PRNGKeyArray,
    memory: PyTree[Array] = None,
) -> Verdict:
    """The verdict on the scores of all the classes.

    **Arguments:**

    - `logits`: the scores.
    - `targets`: the right classes.
    - `solution`, `injection`, `key`, `memory`: as in the verdict.
    """
    known = jnp.maximum(targets, 0)  # An ignored one has a loss too, that counts not.
    return Verdict(
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, known),
        prediction=jnp.argmax(logits, axis=-1).astype(targets.dtype),
        solution=solution,
        injection=injection,
        key=key,
        memory=memory,
    )


class ModelNetwork(AbstractNetwork):
    """A model of the library that judges an image, its pixels, or a sequence."""

    model: models.AbstractModel

    @property
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""
        return self.model.deq

    @property
    def memory(self) -> None:
        """Nothing."""
        return None

    def __call__(self, inputs, targets, memory, state, *, key):
        """Judge one example."""
        injection, state = self.model.inject(inputs, state)
        solution = self.model.deq.solve(injection, key=key)
        logits, state = self.model.read_out(solution.z_star, state)
        if targets.ndim == 2:
            # Of every pixel of the finest scale, which may be smaller than the image.
            size = (len(logits), *targets.shape)
            logits = jnp.moveaxis(jax.image.resize(logits, size, "bilinear"), 0, -1)
        return judge(logits, targets, solution, injection, key), state


class TransformerNetwork(AbstractNetwork):
    """The language model with a memory."""

    model: models.DEQTransformer

    @property
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""
        return self.model.deq

    @property
    def memory(self) -> models.Memory:
        """An empty one."""
        return self.model.empty_memory()

    def __call__(self, inputs, targets, memory, state, *, key):
        """Judge one segment."""
        in_key, cell_key, out_key = jr.split(key, 3)
        segment = self.model.inject(inputs, memory, key=in_key)
        solution = self.model.deq.solve(segment, key=cell_key)
        log_probs = self.model.read_out(solution.z_star, key=out_key)
        memory = self.model.remember(segment, solution.z_star)
        return judge(log_probs, targets, solution, segment, cell_key, memory), state


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
        return judge(logits, targets, solution, injection, key), state


@dataclasses.dataclass(frozen=True)
class TutorialOptions:
    """The tutorial's network."""

    model_type: mnist.ModelType = "deq"
    """Where a solve starts: at zero, at a trained guess, at the cell's own guess."""
    channels: int = 64
    """Channels of the cell."""

    def build(self, data: Data, *, key: PRNGKeyArray) -> TutorialNetwork:
        """The network for some data."""
        _check_labels(data)
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

    def build(self, data: Data, *, key: PRNGKeyArray) -> ModelNetwork:
        """The network for some data."""
        _check_labels(data)
        config = models.TanhConfig(_image_shape(data), self.width, data.num_classes)
        return ModelNetwork(models.TanhDEQ(config, key=key))


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

    def build(self, data: Data, *, key: PRNGKeyArray) -> ModelNetwork:
        """The network for some data."""
        _check_labels(data)
        config = models.ResNetConfig(
            image_shape=_image_shape(data),
            num_classes=data.num_classes,
            **dataclasses.asdict(self),
        )
        return ModelNetwork(models.ResNetDEQ(config, key=key))


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
        return cls(**_fields(cls, config))

    def build(self, data: Data, *, key: PRNGKeyArray) -> ModelNetwork:
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
        return ModelNetwork(model(config, key=key))


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """The language model with a memory."""

    cutoffs: tuple[int, ...] = ()
    """Where clusters of ever rarer words end, with ever narrower embeddings."""
    width: int = 128
    """Of the state at every position."""
    num_heads: int = 4
    """Of the attention."""
    head_width: int = 32
    """Of the attention."""
    inner_width: int = 512
    """Of the feed-forward layer."""
    memory_length: int = 128
    """How many positions before a segment attention sees."""
    local_size: int = 1000
    """How far back it sees at all."""
    dropout: float = 0.05
    """Probability with which features are dropped."""
    attention_dropout: float = 0.0
    """Probability with which weights of the attention are dropped."""
    pre_norm: bool = False
    """Layer normalisation in front of the layers, and not behind them."""
    normalise_weights: bool = True
    """Weight normalisation in the cell."""

    @classmethod
    def of(cls, config: models.TransformerConfig) -> "TransformerOptions":
        """Published sizes."""
        return cls(**_fields(cls, config))

    def build(self, data: Data, *, key: PRNGKeyArray) -> TransformerNetwork:
        """The network for some data."""
        _check_sequence(data)
        config = models.TransformerConfig(
            vocab_size=data.num_classes, **dataclasses.asdict(self)
        )
        return TransformerNetwork(models.DEQTransformer(config, key=key))


@dataclasses.dataclass(frozen=True)
class CausalTransformerOptions:
    """The small language model, without a memory."""

    width: int = 256
    """Of the state at every position."""
    num_heads: int = 4
    """Of the attention."""
    dropout: float = 0.1
    """Probability with which features are dropped."""

    def build(self, data: Data, *, key: PRNGKeyArray) -> ModelNetwork:
        """The network for some data."""
        _check_sequence(data)
        config = models.CausalTransformerConfig(
            vocab_size=data.num_classes,
            length=data.input_shape[0],
            **dataclasses.asdict(self),
        )
        return ModelNetwork(models.CausalTransformerDEQ(config, key=key))


def _fields(cls: type, config: Any) -> dict[str, Any]:
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(cls)
    }


def _image_shape(data: Data) -> tuple[int, int, int]:
    if len(data.input_shape) != 3:
        raise DataError("The model takes images.")
    return data.input_shape


def _check_labels(data: Data) -> None:
    if _image_shape(data) and data.target_shape != ():
        raise DataError("The model takes images with labels, and these have masks.")


def _check_sequence(data: Data) -> None:
    if len(data.input_shape) != 1:
        raise DataError("The model takes text and other sequences.")


ModelOptions: TypeAlias = (
    CausalTransformerOptions
    | MDEQOptions
    | ResNetOptions
    | TanhOptions
    | TransformerOptions
    | TutorialOptions
)


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

    `DataError` if the model and the data do not fit, and `OptionError` if the options
    do not go together.
    """
    try:
        network, state = eqx.nn.make_with_state(options.build)(data, key=key)
    except ValueError as error:  # of sizes
        raise OptionError(str(error)) from error
    layer = make_layer(network.layer, equilibrium)
    return eqx.tree_at(lambda network: network.layer, network, layer), state
