"""The models in the one form that the training script knows.

A network reads one example and says its loss; batches come from `jax.vmap` with the
axis name `batch`.
"""

import abc
import dataclasses
from collections.abc import Callable
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

from .data import Data, Text
from .equilibrium import EquilibriumOptions, make_layer
from .errors import DataError, OptionError, with_flags
from .sciml import SciMLClassifier, SciMLConfig


ModelConfig: TypeAlias = (
    models.CausalTransformerConfig
    | models.MDEQConfig
    | models.ResNetConfig
    | models.TanhConfig
    | models.TransformerConfig
    | SciMLConfig
)


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

    model: eqx.AbstractVar[models.AbstractModel | models.DEQTransformer]

    @property
    def layer(self) -> inn.AbstractDeepEquilibriumNetwork:
        """The equilibrium layer."""
        return self.model.deq

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
        """Judge one example."""


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
    """The verdict on the scores of all the classes."""
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
    def memory(self) -> None:
        """Nothing."""
        return None

    def __call__(
        self,
        inputs: Array,
        targets: Int[Array, "..."],
        memory: None,
        state: eqx.nn.State,
        *,
        key: PRNGKeyArray,
    ) -> tuple[Verdict, eqx.nn.State]:
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
    def memory(self) -> models.Memory:
        """An empty one."""
        return self.model.empty_memory()

    def __call__(
        self,
        inputs: Int[Array, " position"],
        targets: Int[Array, " position"],
        memory: models.Memory,
        state: eqx.nn.State,
        *,
        key: PRNGKeyArray,
    ) -> tuple[Verdict, eqx.nn.State]:
        in_key, cell_key, out_key = jr.split(key, 3)
        segment = self.model.inject(inputs, memory, key=in_key)
        solution = self.model.deq.solve(segment, key=cell_key)
        log_probs = self.model.read_out(solution.z_star, key=out_key)
        memory = self.model.remember(segment, solution.z_star)
        return judge(log_probs, targets, solution, segment, cell_key, memory), state


# What follows from the data in the models' configurations.
_FROM_DATA: dict[str, Callable[[Data], Any]] = {
    "image_shape": lambda data: data.input_shape,
    "in_channels": lambda data: data.input_shape[0],
    "length": lambda data: data.input_shape[0],
    "num_classes": lambda data: data.num_classes,
    "vocab_size": lambda data: data.num_classes,
}


def option_names(config: type[ModelConfig]) -> list[str]:
    """The fields of a configuration that do not follow from the data."""
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if name not in _FROM_DATA]


def sized_for(config: ModelConfig, data: Data) -> ModelConfig:
    """A configuration, with the fields that follow from the data."""
    names = [field.name for field in dataclasses.fields(config)]
    known = {name: of(data) for name, of in _FROM_DATA.items() if name in names}
    return dataclasses.replace(config, **known)


def _check_fit(config: ModelConfig, data: Data) -> None:
    if isinstance(config, models.CausalTransformerConfig | models.TransformerConfig):
        if len(data.input_shape) != 1:
            raise DataError("The model takes text and other sequences.")
        if isinstance(config, models.CausalTransformerConfig):
            _check_length(data)
        return
    if len(data.input_shape) != 3:
        raise DataError("The model takes images.")
    if isinstance(config, models.MDEQConfig):
        _, height, width = data.input_shape
        multiple = 2 ** (config.num_downsamples + len(config.channels) - 1)
        if height % multiple or width % multiple:
            raise DataError(
                f"The scales need images whose sides are multiples of {multiple}; "
                f"these have {height} x {width} pixels."
            )
    elif data.target_shape != ():
        raise DataError("The model takes images with labels, and these have masks.")


def _check_length(data: Data) -> None:
    train, test = data.train, data.test
    if not (isinstance(train, Text) and isinstance(test, Text)):
        return
    if test.length > train.length:
        raise OptionError(
            "--test-sequence-length must be at most --sequence-length, "
            f"{train.length}, for this model."
        )


def _network(
    config: ModelConfig, has_masks: bool, *, key: PRNGKeyArray
) -> AbstractNetwork:
    match config:
        case models.TransformerConfig():
            return TransformerNetwork(models.DEQTransformer(config, key=key))
        case models.CausalTransformerConfig():
            model = models.CausalTransformerDEQ(config, key=key)
        case models.MDEQConfig() if has_masks:
            model = models.MDEQSegmenter(config, key=key)
        case models.MDEQConfig():
            model = models.MDEQ(config, key=key)
        case models.ResNetConfig():
            model = models.ResNetDEQ(config, key=key)
        case models.TanhConfig():
            model = models.TanhDEQ(config, key=key)
        case SciMLConfig():
            model = SciMLClassifier(config, key=key)
    return ModelNetwork(model)


def build(
    config: ModelConfig,
    equilibrium: EquilibriumOptions,
    data: Data,
    *,
    key: PRNGKeyArray,
) -> tuple[AbstractNetwork, eqx.nn.State]:
    """A network with fresh weights, and its state.

    What follows from the data need not be right in the configuration.
    """
    _check_fit(config, data)
    make = eqx.nn.make_with_state(_network)
    try:
        network, state = make(sized_for(config, data), data.target_shape != (), key=key)
    except ValueError as error:  # of sizes
        raise OptionError(with_flags(error)) from error
    layer = make_layer(network.layer, equilibrium)
    return eqx.tree_at(lambda network: network.layer, network, layer), state
