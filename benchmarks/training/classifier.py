"""The fully connected classifier of Pal et al., with any layer in its middle.

784-128-10, with the cell `relu(W z) + relu(U x)`. The sizes, the loss and the optimiser
are those of the authors' script (*Mixing Implicit and Explicit Deep Learning with Skip
DEQs and Infinite Time Neural ODEs*, 2022; SciML/DeepEquilibriumNetworks.jl,
`experiments/mnist/mnist_fc.jl` at f65e24d). The weights are apart from the layer, so
that layers of every kind can be trained, and compared at the same weights.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optax
import optimistix as optx
from jaxtyping import Array, Float, Int

import implicitnets as inn

from ..kit.results import TimingSettings
from .data import Batch, DataOptions, Examples, load
from .fit import Clock, descend, fit


WIDTH = 128
NUM_CLASSES = 10
# The paper's, relative and absolute.
TOLERANCE = 5e-3
MAX_STEPS = 50

Dataset = Literal["digits", "mnist_subset", "fashion_mnist"]


@dataclasses.dataclass(frozen=True)
class TrainingSettings(TimingSettings):
    """The options of the scripts that train the classifier."""

    steps: int = 1000
    """Train every model for so many steps."""
    batch_size: int = 32
    """Use so many examples in a training step."""
    seeds: int = 3
    """Train so many times, with other weights and batches."""
    train_size: int | None = None
    """Train only on so many images."""
    test_size: int = 1000
    """Test on at most so many images."""
    data_dir: pathlib.Path | None = None
    """Read the files of Fashion-MNIST from this folder. Without it, train only on the
    images that come with packages: scikit-learn's digits, and 5,000 of MNIST."""

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """Those that there are."""
        packaged: tuple[Dataset, ...] = ("digits", "mnist_subset")
        return packaged if self.data_dir is None else (*packaged, "fashion_mnist")

    def load(self, dataset: Dataset) -> tuple[Batch, Batch]:
        """The images and labels to train on, and those to test on."""
        folder = self.data_dir if dataset == "fashion_mnist" else None
        data = load(DataOptions(dataset, folder, self.train_size, self.test_size))
        train, test = (
            part.numbers()
            for part in (data.train, data.test)
            if isinstance(part, Examples)
        )
        return train, test


class Cell(eqx.Module):
    """`relu(W z) + relu(U x)`."""

    state: eqx.nn.Linear
    inject: eqx.nn.Linear

    def __call__(self, z: Float[Array, " width"], x: Float[Array, " width"]) -> Array:
        """The next state."""
        return jax.nn.relu(self.state(z)) + jax.nn.relu(self.inject(x))


class Weights(eqx.Module):
    """All that is trained. `start` predicts the equilibrium, in a Skip DEQ only."""

    stem: eqx.nn.Linear
    cell: Cell
    start: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, num_pixels: int, *, key: Array):
        stem, state, inject, start, head = jr.split(key, 5)
        linear = eqx.nn.Linear
        self.stem = linear(num_pixels, WIDTH, key=stem)
        self.cell = Cell(
            linear(WIDTH, WIDTH, use_bias=False, key=state),
            linear(WIDTH, WIDTH, use_bias=False, key=inject),
        )
        self.start = linear(WIDTH, WIDTH, key=start)
        self.head = linear(WIDTH, NUM_CLASSES, key=head)


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer for the middle of the classifier, and the penalties it is trained with.

    `layer(weights)` is the layer with the weights' cell. `attract` is whether the skip
    penalty also pulls the equilibrium towards the start.
    """

    name: str
    layer: Callable[[Weights], Any]
    skip_weight: float = 0.0
    attract: bool = True
    jacobian_weight: float = 0.0

    def solve(self, weights: Weights, images: Array) -> inn.EquilibriumSolution:
        """The layer's states for a batch of images."""

        def one(image):
            x = jax.nn.relu(weights.stem(jnp.ravel(image)))
            return self.layer(weights).solve(x)

        return jax.vmap(one)(images)

    def loss(
        self,
        weights: Weights,
        images: Float[Array, "batch ..."],
        labels: Int[Array, " batch"],
        key: Array,
    ) -> tuple[Array, None]:
        """The cross entropy and the penalties, as a step of training takes them."""
        solution = self.solve(weights, images)
        logits = jax.vmap(weights.head)(solution.z_star)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = jnp.mean(losses)
        if self.skip_weight > 0:
            z_star = solution.z_star
            target = z_star if self.attract else lax.stop_gradient(z_star)
            distance = jnp.mean(jnp.abs(target - solution.z0))
            loss = loss + self.skip_weight * distance
        if self.jacobian_weight > 0:
            # This cell's Jacobian does not depend on the input.
            penalties = jax.vmap(
                lambda z, key: inn.jacobian_penalty(weights.cell, z, z, key=key)
            )(solution.z_star, jr.split(key, len(images)))
            loss = loss + self.jacobian_weight * jnp.mean(penalties)
        return loss, None


def train(
    config: TrainingSettings, model: Model, train_set: Batch
) -> tuple[Weights, float]:
    """Train a model from every seed, all at once.

    Returned are the weights, with a leading axis for the seeds, and the seconds of a
    training step without compilation.
    """
    images, labels = map(jnp.asarray, train_set)
    schedule = optax.cosine_decay_schedule(1e-3, config.steps, alpha=1e-3)
    optimiser = optax.adamw(schedule, weight_decay=2.5e-6)
    gradient_fn = jax.grad(model.loss, has_aux=True)

    @jax.vmap
    def start(key):
        weights_key, key = jr.split(key)
        weights: Any = Weights(images[0].size, key=weights_key)
        return (weights, optimiser.init(weights)), jr.split(key, config.steps)

    def update(carry, keys, images, labels):
        def of_seed(carry, key):
            batch_key, key = jr.split(key)
            rows = jr.randint(batch_key, (config.batch_size,), 0, len(images))
            batch = images[rows], labels[rows], key
            return descend(gradient_fn, optimiser, *carry, *batch)[:2]

        return jax.vmap(of_seed)(carry, keys)

    carry, keys = start(jr.split(jr.key(0), config.seeds))
    clock = Clock()
    update = clock.compile(update, carry, keys[:, 0], images, labels)
    (weights, _), _ = fit(
        lambda carry, keys: (update(carry, keys, images, labels), None),
        carry,
        list(jnp.swapaxes(keys, 0, 1)),
        clock,
    )
    return weights, clock.seconds / config.steps


def evaluate(
    model: Model, weights: Weights, test_set: Batch
) -> dict[str, Float[Array, " seed"]]:
    """What a model does on a test set.

    For every seed: the accuracy, the mean evaluations of an example, the share of
    successful solves, the median relative residual, and the share of the state's
    elements that are zero for every example.
    """
    images, labels = map(jnp.asarray, test_set)

    def run(weights):
        solution = model.solve(weights, images)
        predicted = jnp.argmax(jax.vmap(weights.head)(solution.z_star), axis=1)
        norm = jax.vmap(optx.two_norm)
        # The value of the cell is the state and the residual.
        relative = norm(solution.residual) / norm(solution.z_star + solution.residual)
        return {
            "accuracy": jnp.mean(predicted == labels),
            "evaluations": jnp.mean(solution.stats["nfe"]),
            "converged": jnp.mean(solution.result == optx.RESULTS.successful),
            "residual": jnp.median(relative),
            "silent": jnp.mean(jnp.all(solution.z_star < 1e-6, axis=0)),
        }

    return jax.jit(jax.vmap(run))(weights)
