"""The network of SciML's MNIST tutorial.

*Training a Simple MNIST Classifier using Deep Equilibrium Models*, of the documentation
of DeepEquilibriumNetworks.jl. Images of 28 x 28 pixels become a state of 13 x 13, and
smaller ones, such as scikit-learn's digits, keep their size but for the border. All
weights are drawn as there, from Lux 1's distributions.
"""

import dataclasses
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import implicitnets as inn
from implicitnets import models


ModelType = Literal["deq", "skipdeq", "skipregdeq"]


@dataclasses.dataclass(frozen=True)
class SciMLConfig:
    """The kind and the sizes of SciML's network."""

    image_shape: tuple[int, int, int] = (1, 28, 28)
    """The channels, height and width of an example."""
    model_type: ModelType = "deq"
    """Where a solve starts: at zero (`deq`), at a trained guess (`skipdeq`), or at the
    cell's value for zeros (`skipregdeq`)."""
    channels: int = 64
    """How many channels the cell has."""
    windows: int = 1
    """The head sees every channel's means over so many windows by as many. In the
    tutorial there is one, of all pixels."""
    num_classes: int = 10
    """The number of logits."""

    def __post_init__(self):
        for name in ("channels", "windows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be positive; got {value}.")


_Layer = TypeVar("_Layer", eqx.nn.Conv2d, eqx.nn.Linear)


def as_in_lux(layer: _Layer) -> _Layer:
    """A layer with the weights that Lux draws: `sqrt(3)` times as large as Equinox'
    ones. Its biases are alike."""
    return eqx.tree_at(lambda layer: layer.weight, layer, 3**0.5 * layer.weight)


class SciMLCell(eqx.Module):
    """`tanh(mix(tanh(state(z)) + tanh(inject(x))))`: convolutions with small weights.

    **Arguments:**

    - `channels`: of the state.
    - `key`: for the weights. Keyword only argument.
    """

    state: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d
    mix: eqx.nn.Conv2d

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        conv = eqx.nn.Conv2d(channels, channels, 3, padding=1, use_bias=False, key=key)
        # Theirs is truncated at two, which are 200 deviations.
        initialiser = jax.nn.initializers.normal(0.01)
        self.state, self.inject, self.mix = inn.nn.initialise(
            (conv, conv, conv), initialiser, key=key
        )

    def __call__(
        self,
        z: Float[Array, "channel height width"],
        x: Float[Array, "channel height width"],
    ) -> Float[Array, "channel height width"]:
        """The next state."""
        return jnp.tanh(self.mix(jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))))


class AbstractClassifier(models.AbstractModel):
    """A model that is a stem, an equilibrium and a head, without statistics."""

    stem: eqx.AbstractVar[eqx.nn.Sequential]
    head: eqx.AbstractVar[eqx.nn.Sequential]

    def inject(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, "channel height width"], eqx.nn.State]:
        return self.stem(x), state

    def read_out(
        self, z: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[Float[Array, " class"], eqx.nn.State]:
        return self.head(z), state


class SciMLClassifier(AbstractClassifier):
    """A convolutional classifier whose head sees means of the state's channels.

    **Arguments:**

    - `config`: the kind and the sizes.
    - `solver`: of the layer.
    - `key`: for the weights. Keyword only argument.
    """

    stem: eqx.nn.Sequential
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Sequential

    def __init__(
        self,
        config: SciMLConfig,
        solver: inn.AndersonAcceleration = inn.AndersonAcceleration(1e-3, 1e-6),
        *,
        key: PRNGKeyArray,
    ):
        stem_key, down_key, deq_key, head_key = jr.split(key, 4)
        in_channels, size, _ = config.image_shape
        channels = config.channels
        kernel_size, stride = (4, 2) if size > 16 else (3, 1)
        self.stem = eqx.nn.Sequential(
            [
                as_in_lux(eqx.nn.Conv2d(in_channels, channels, 3, key=stem_key)),
                eqx.nn.Lambda(jax.nn.gelu),
                eqx.nn.GroupNorm(channels, channels),
                as_in_lux(
                    eqx.nn.Conv2d(
                        channels, channels, kernel_size, stride, padding=1, key=down_key
                    )
                ),
            ]
        )
        cell_key, init_key = jr.split(deq_key)
        cell = SciMLCell(channels, key=cell_key)
        if config.model_type == "deq":
            self.deq = inn.DeepEquilibriumNetwork(cell, solver)
        else:
            guess = eqx.nn.Conv2d(channels, channels, 3, padding=1, key=init_key)
            init = eqx.nn.Sequential([as_in_lux(guess), eqx.nn.Lambda(jax.nn.gelu)])
            self.deq = inn.SkipDeepEquilibriumNetwork(
                cell, solver, init=init if config.model_type == "skipdeq" else None
            )
        pool = eqx.nn.AdaptiveAvgPool2d(config.windows)
        num_features = channels * config.windows**2
        linear = eqx.nn.Linear(num_features, config.num_classes, key=head_key)
        self.head = eqx.nn.Sequential(
            [
                eqx.nn.GroupNorm(channels, channels),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Lambda(lambda features: jnp.ravel(pool(features))),
                as_in_lux(linear),
            ]
        )
