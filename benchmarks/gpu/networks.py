"""The networks that are trained on the device."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree

import implicitnets as inn
from implicitnets import models

from ..training.sciml import AbstractClassifier, SciMLCell


class Rounded(eqx.Module):
    """A cell that computes in another precision than its state has."""

    cell: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, z: Array, x: PyTree[Array]) -> Array:
        """The next state, of the dtype of `z`."""

        def cast(leaf):
            return leaf.astype(self.dtype) if eqx.is_inexact_array(leaf) else leaf

        cell, rounded, x = jax.tree.map(cast, (self.cell, z, x))
        return cell(rounded, x).astype(z.dtype)


class ImageClassifier(AbstractClassifier):
    """The network of the MNIST tutorial: a stem, SciML's cell, and a linear head.

    **Arguments:**

    - `image_shape`: of an example.
    - `solver`: of the layer.
    - `channels`: of the cell.
    - `key`: for the weights. Keyword only argument.
    """

    stem: eqx.nn.Sequential
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Sequential

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        solver: inn.AndersonAcceleration = inn.AndersonAcceleration(1e-3, 1e-6),
        channels: int = 32,
        *,
        key: PRNGKeyArray,
    ):
        in_channels, side, _ = image_shape
        keys = jr.split(key, 4)
        stride = 2 if side > 16 else 1
        first = eqx.nn.Conv2d(in_channels, channels, 3, stride, padding=1, key=keys[0])
        second = eqx.nn.Conv2d(channels, channels, 3, 2, padding=1, key=keys[1])
        features = channels * (side // stride // 2) ** 2
        last = eqx.nn.Linear(features, 10, key=keys[3])
        norms = [eqx.nn.GroupNorm(channels, channels) for _ in range(2)]
        gelu, relu, flatten = map(eqx.nn.Lambda, (jax.nn.gelu, jax.nn.relu, jnp.ravel))
        self.stem = eqx.nn.Sequential([first, gelu, norms[0], second])
        cell = SciMLCell(channels, key=keys[2])
        self.deq = inn.DeepEquilibriumNetwork(cell, solver)
        self.head = eqx.nn.Sequential([norms[1], relu, flatten, last])


def image_classifier(image_shape: tuple[int, int, int], seed: int) -> ImageClassifier:
    """The tutorial's network with He-uniform weights outside of the cell."""
    keys = jr.split(jr.key(seed))
    model = ImageClassifier(image_shape, key=keys[0])
    ends = inn.nn.initialise((model.stem, model.head), key=keys[1])
    return eqx.tree_at(lambda model: (model.stem, model.head), model, ends)


def language_model(
    vocab_size: int, length: int, width: int, seed: int
) -> models.CausalTransformerDEQ:
    """A transformer layer at equilibrium, without dropout."""
    config = models.CausalTransformerConfig(
        vocab_size, length, width, num_heads=max(1, width // 64), dropout=0.0
    )
    return models.CausalTransformerDEQ(config, key=jr.key(seed))


def with_layer(model: Any, layer: inn.AbstractDeepEquilibriumNetwork) -> Any:
    """A model with another equilibrium layer."""
    return eqx.tree_at(lambda model: model.deq, model, layer)


def tightly_solved(model: Any) -> Any:
    """A model whose equilibria are so exact that no position sees the later ones."""
    cell = model.deq.cell
    layer = dataclasses.replace(
        model.deq,
        cell=cell.cell if isinstance(cell, Rounded) else cell,
        solver=inn.AndersonAcceleration(1e-4, 0.0),
        max_steps=100,
    )
    return with_layer(model, layer)


def in_bfloat16(model: Any) -> Any:
    """A model whose cell computes in bfloat16; state and weights stay in float32."""
    cell = Rounded(model.deq.cell, jnp.bfloat16)
    return with_layer(model, dataclasses.replace(model.deq, cell=cell))
