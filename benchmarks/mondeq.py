"""Do monotone operator cells converge in every step of a training on real images?

One epoch of a classifier of Fashion-MNIST with a monotone operator cell (Winston and
Kolter, *Monotone Operator Equilibrium Networks*, 2020), solved by operator splitting to
a relative residual of 1e-2: solver steps forwards and backwards, failed and diverged
solves, test accuracy.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import tyro
from jaxtyping import PRNGKeyArray

import implicitnets as inn

from .kit.results import save, Settings
from .kit.tables import print_table, Row
from .kit.timing import progress
from .tutorial import mnist


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Train a monotone operator network for one epoch."""

    data_dir: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Folder of Fashion-MNIST's files; this is where a Debian package has them."""
    cell: Literal["dense", "conv"] = "dense"
    """The kind of cell."""
    size: int = 100
    """Elements of the dense cell's state."""
    channels: int = 16
    """Channels of the convolutional cell's state."""
    rtol: float = 1e-2
    """Relative tolerance of the solver."""
    batch_size: int = 128
    """Images a training step."""
    learning_rate: float = 1e-3
    """Adam's."""
    train_size: int | None = None
    """Train on so many images only."""
    test_size: int | None = None
    """Test on so many images only."""


class Classifier(eqx.Module):
    """An equilibrium, pooled if it is an image, and a linear layer."""

    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(self, config: Config, solver: Any, *, key: PRNGKeyArray):
        cell_key, head_key = jr.split(key)
        if config.cell == "dense":
            cell = inn.nn.MonotoneCell(28 * 28, config.size, key=cell_key)
            shape = (config.size,)
            features = config.size
        else:
            cell = inn.nn.MonotoneConvCell(2, 1, config.channels, 3, key=cell_key)
            shape = (config.channels, 28, 28)
            features = config.channels * 7 * 7
        self.deq = inn.DeepEquilibriumNetwork(
            cell, solver, init=lambda _: jnp.zeros(shape)
        )
        self.head = eqx.nn.Linear(features, 10, key=head_key)

    def __call__(self, image, probe):
        x = image if image.ndim == 3 and self.is_conv else image.reshape(-1)
        solution = self.deq.solve(x, probe=probe)
        z = solution.z_star
        if self.is_conv:
            z = z.reshape(len(z), 7, 4, 7, 4).mean((2, 4)).reshape(-1)
        return self.head(z), solution

    @property
    def is_conv(self) -> bool:
        """Whether the state is an image."""
        return isinstance(self.deq.cell, inn.nn.MonotoneConvCell)


def loss_fn(model_and_probe, images, labels):
    model, probe = model_and_probe
    logits, solution = jax.vmap(model)(images, probe)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.argmax(logits, axis=1) == labels
    failed = solution.result != optx.RESULTS.successful
    diverged = (solution.result == optx.RESULTS.nonlinear_divergence) | (
        solution.result == optx.RESULTS.nonfinite
    )
    found = jnp.mean(correct), solution.stats["num_steps"], failed, diverged
    return jnp.mean(losses), found


def run(config: Config, name: str, solver: Any) -> Row:
    """One epoch with one solver, and the test."""
    train_set, test_set = (
        part[:size]
        for part, size in zip(
            mnist.load_folder(config.data_dir, "fashion_mnist"),
            (config.train_size, config.test_size),
            strict=True,
        )
    )
    model = Classifier(config, solver, key=jr.key(0))
    optimiser = optax.adam(config.learning_rate)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    probe = inn.AdjointReport.probe((config.batch_size,))

    @eqx.filter_jit(donate="all")
    def step(model, state, images, labels):
        value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), found = value_and_grad((model, probe), images, labels)
        gradient, backward = found
        updates, state = optimiser.update(gradient, state)
        metrics = loss, *metrics, backward.num_steps, ~backward.successful
        return eqx.apply_updates(model, updates), state, metrics

    order = np.random.default_rng(0).permutation(len(train_set))
    num_batches = len(order) // config.batch_size
    batches = order[: num_batches * config.batch_size].reshape(num_batches, -1)
    history, start = [], time.perf_counter()
    for rows in progress(batches, name):
        batch = train_set[rows]
        model, state, metrics = step(
            model, state, jnp.asarray(batch.images), jnp.asarray(batch.labels)
        )
        history.append(metrics)
    seconds = time.perf_counter() - start
    losses, _, steps, failed, diverged, backward_steps, backward_failed = (
        np.asarray(x) for x in zip(*history, strict=True)
    )
    evaluate = eqx.filter_jit(loss_fn)
    accuracies = []
    for i in range(0, len(test_set) - config.batch_size + 1, config.batch_size):
        batch = test_set[slice(i, i + config.batch_size)]
        _, (accuracy, *_) = evaluate(
            (model, probe), jnp.asarray(batch.images), jnp.asarray(batch.labels)
        )
        accuracies.append(accuracy)
    return {
        "cell": config.cell,
        "solver": name,
        "training steps": num_batches,
        "last loss": float(losses[-20:].mean()),
        "test accuracy": float(np.mean(accuracies)),
        "solver steps, mean": float(steps.mean()),
        "solver steps, most": int(steps.max()),
        "backward steps, mean": float(backward_steps.mean()),
        "backward steps, most": int(backward_steps.max()),
        "solves": failed.size,
        "failed solves": int(failed.sum()),
        "diverged solves": int(diverged.sum()),
        "failed backward solves": int(backward_failed.sum()),
        "seconds": seconds,
    }


def main() -> None:
    config = tyro.cli(Config)
    solvers = {
        "Peaceman-Rachford": inn.PeacemanRachford(config.rtol, 0.0),
        "forward-backward": inn.ForwardBackward(config.rtol, 0.0),
    }
    rows = [run(config, name, solver) for name, solver in solvers.items()]
    print_table("One epoch", rows)
    save(config, "mondeq", {"rows": rows})


if __name__ == "__main__":
    main()
