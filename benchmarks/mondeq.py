"""Do monotone operator cells converge in every step of a training on real images?

One epoch of a classifier of Fashion-MNIST with a monotone operator cell (Winston and
Kolter, *Monotone Operator Equilibrium Networks*, 2020), solved by operator splitting to
a relative residual of 1e-2: solver steps forwards and backwards, failed and diverged
solves, test accuracy.
"""

import dataclasses
import pathlib
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
from .training.data import Data, DataOptions, IGNORED, load
from .training.fit import Clock, descend, fit


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Train a monotone operator network for one epoch."""

    data_dir: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Read the files of Fashion-MNIST from this folder, by default that of Debian's
    package."""
    cell: Literal["dense", "conv"] = "dense"
    """Train a cell of this kind."""
    size: int = 100
    """Give the dense cell's state so many elements."""
    channels: int = 16
    """Give the convolutional cell's state so many channels."""
    rtol: float = 1e-2
    """Solve to this relative tolerance."""
    batch_size: int = 128
    """Use so many images in a training step."""
    learning_rate: float = 1e-3
    """Train at this learning rate, by Adam."""
    train_size: int | None = None
    """Train only on so many images."""
    test_size: int | None = None
    """Test only on so many images."""


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
    loss = jnp.mean(losses)
    return loss, {
        "loss": loss,
        "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
        "steps": solution.stats["num_steps"],
        "failed": solution.result != optx.RESULTS.successful,
        "diverged": (solution.result == optx.RESULTS.nonlinear_divergence)
        | (solution.result == optx.RESULTS.nonfinite),
    }


def run(config: Config, name: str, solver: Any, data: Data) -> Row:
    """One epoch with one solver, and the test."""
    model = Classifier(config, solver, key=jr.key(0))
    optimiser = optax.adam(config.learning_rate)
    probe = inn.AdjointReport.probe((config.batch_size,))

    def gradient_fn(model, images, labels):
        gradients = eqx.filter_grad(loss_fn, has_aux=True)
        (gradient, report), found = gradients((model, probe), images, labels)
        found |= {"backward steps": report.num_steps}
        return gradient, found | {"backward failed": ~report.successful}

    @eqx.filter_jit(donate="all")
    def step(carry, batch):
        *carry, found = descend(gradient_fn, optimiser, *carry, *batch)
        return tuple(carry), found

    num_batches = data.train.steps_per_epoch(config.batch_size)
    batches = (
        data.train.training_batch(i, config.batch_size, seed=0)
        for i in progress(range(num_batches), name)
    )
    clock = Clock()
    carry = model, optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    (model, _), history = fit(step, carry, batches, clock)
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *history)
    evaluate = eqx.filter_jit(loss_fn)
    accuracies = [
        evaluate((model, probe), *batch)[1]["accuracy"]
        for batch in data.test.test_batches(config.batch_size)
        if (batch[1] != IGNORED).all()
    ]
    return {
        "cell": config.cell,
        "solver": name,
        "training steps": num_batches,
        "last loss": float(found["loss"][-20:].mean()),
        "test accuracy": float(np.mean(accuracies)),
        "solver steps, mean": float(found["steps"].mean()),
        "solver steps, most": int(found["steps"].max()),
        "backward steps, mean": float(found["backward steps"].mean()),
        "backward steps, most": int(found["backward steps"].max()),
        "solves": found["failed"].size,
        "failed solves": int(found["failed"].sum()),
        "diverged solves": int(found["diverged"].sum()),
        "failed backward solves": int(found["backward failed"].sum()),
        "seconds": clock.seconds,
    }


def main() -> None:
    config = tyro.cli(Config)
    solvers = {
        "Peaceman-Rachford": inn.PeacemanRachford(config.rtol, 0.0),
        "forward-backward": inn.ForwardBackward(config.rtol, 0.0),
    }
    options = DataOptions(
        "fashion_mnist", config.data_dir, config.train_size, config.test_size
    )
    data = load(options)
    rows = [run(config, name, solver, data) for name, solver in solvers.items()]
    print_table("One epoch", rows)
    save(config, "mondeq", {"rows": rows})


if __name__ == "__main__":
    main()
