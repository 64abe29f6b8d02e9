"""Does the Jacobian penalty make equilibria that survive being stopped early?

The synthetic regression of Bai et al., *Stabilizing Equilibrium Models by Jacobian
Regularization*, 2021, figure 3 and appendix: a state of one number, trained by Broyden
steps of a fixed budget with several weights of the penalty. Shows the residual and the
test loss after every evaluation.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from measure import print_table, progress, promise, Row, save, Settings

import implicitnets as inn


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Train on the synthetic task with and without the penalty."""

    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """The penalty's weights."""
    probability: float = 0.4
    """In what part of the training steps the penalty counts."""
    epochs: int = 50
    """How often the training set is gone through."""
    batch_size: int = 64
    """Examples a training step."""
    learning_rate: float = 1e-3
    """Adam's, at the start of its cosine schedule."""
    hidden: int = 50
    """Width of the cell."""
    max_steps: int = 6
    """Solver steps in training, forward and backward."""
    train_size: int = 4096
    """Examples to train on."""
    test_size: int = 1000
    """Examples to test on."""
    num_seeds: int = 3
    """Trainings of each weight; the means are shown."""


class Cell(eqx.Module):
    """`W2 relu(W1 z + U x + b)`."""

    inner: eqx.nn.Linear
    inject: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, hidden: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.inner = eqx.nn.Linear(1, hidden, use_bias=False, key=keys[0])
        self.inject = eqx.nn.Linear(1, hidden, key=keys[1])
        self.outer = eqx.nn.Linear(hidden, 1, use_bias=False, key=keys[2])

    def __call__(self, z, x):
        return self.outer(jax.nn.relu(self.inner(z) + self.inject(x)))


def make_data(
    size: int, *, key: PRNGKeyArray
) -> tuple[Float[Array, "size 1"], Float[Array, "size 1"]]:
    """The paper's curve with its noise. The range of `x` is ours: it states none."""
    x_key, noise_key = jr.split(key)
    x = jr.uniform(x_key, (size, 1), minval=-2.0, maxval=2.0)
    noise = 0.05 * jr.normal(noise_key, (size, 1))
    return x, 1.5 * x**3 + x**2 - 5 * x + 2 * jnp.sin(x) - 3 + noise


def layer(config: Config, cell: Cell, max_steps: int) -> inn.DeepEquilibriumNetwork:
    """The equilibrium layer, for a budget of evaluations."""
    linear_solver = inn.GivensGMRES(rtol=1e-4, atol=0.0, max_steps=config.max_steps)
    return inn.DeepEquilibriumNetwork(
        cell,
        inn.Broyden(rtol=1e-3, atol=0.0, history_size=config.max_steps),
        adjoint=inn.ImplicitAdjoint(linear_solver),
        max_steps=max_steps,
    )


def train(config: Config, weight: float, seed: int) -> Cell:
    """A cell trained with one weight of the penalty."""
    data_key, cell_key, key = jr.split(jr.key(seed), 3)
    xs, ys = make_data(config.train_size, key=data_key)
    cell = Cell(config.hidden, key=cell_key)
    num_batches = config.train_size // config.batch_size
    schedule = optax.cosine_decay_schedule(
        config.learning_rate, config.epochs * num_batches
    )
    optimiser = optax.adam(schedule)

    def loss_fn(cell, x, y, key):
        z = jax.vmap(layer(config, cell, config.max_steps))(x)

        def penalty(key):
            keys = jr.split(key, len(x))
            each = jax.vmap(lambda z, x, k: inn.jacobian_penalty(cell, z, x, key=k))
            return jnp.mean(each(z, x, keys))

        regular = inn.sometimes(config.probability, penalty, key=key)
        return jnp.mean((z - y) ** 2) + weight * regular

    def step(carry, batch):
        cell, state = carry
        gradient = eqx.filter_grad(loss_fn)(cell, *batch)
        updates, state = optimiser.update(gradient, state)
        return (eqx.apply_updates(cell, updates), state), None

    @jax.jit
    def epoch(cell, state, key):
        order_key, key = jr.split(key)
        rows = jr.permutation(order_key, config.train_size)
        rows = rows[: num_batches * config.batch_size].reshape(num_batches, -1)
        batches = xs[rows], ys[rows], jr.split(key, num_batches)
        return jax.lax.scan(step, (cell, state), batches)[0]

    state = optimiser.init(eqx.filter(cell, eqx.is_array))
    epoch_keys = jr.split(key, config.epochs)
    for epoch_key in progress(epoch_keys, f"weight {weight}, seed {seed}"):
        cell, state = epoch(cell, state, epoch_key)
    return cell


def evaluate(config: Config, cell: Cell, max_evaluations: int) -> dict[str, np.ndarray]:
    """Residual and loss after every evaluation, means over the test set."""
    x, y = make_data(config.test_size, key=jr.key(1000))

    def after(budget):
        solution = jax.vmap(layer(config, cell, budget).solve)(x)
        residual = jnp.abs(solution.residual) / jnp.abs(
            solution.residual + solution.z_star
        )
        return jnp.mean(residual), jnp.mean((solution.z_star - y) ** 2)

    curves = [
        jax.jit(after, static_argnums=0)(n) for n in range(1, max_evaluations + 1)
    ]
    residuals, losses = np.asarray(curves).T
    _, converged = jax.jit(after, static_argnums=0)(200)
    radius = jax.vmap(
        lambda x: jnp.abs(
            jax.jacobian(lambda z: cell(z, x))(layer(config, cell, 200)(x))
        )
    )(x)
    return {
        "residual": residuals,
        "loss": losses,
        "converged loss": np.asarray(converged),
        "radius": np.asarray(radius.mean()),
    }


def draw(curves: dict[float, dict[str, np.ndarray]]) -> Figure:
    """Residual and loss against evaluations, a line a weight."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("residual", "loss"), strict=True):
        for weight, curve in curves.items():
            numbers = np.arange(1, len(curve[name]) + 1)
            axis.semilogy(numbers, curve[name], marker=".", label=f"weight {weight:g}")
        axis.set(xlabel="evaluations", ylabel=f"test {name}")
    axes[0].legend()
    return figure


def main() -> None:
    config = tyro.cli(Config)
    curves, rows = {}, []
    for weight in config.weights:
        runs = [
            evaluate(config, train(config, weight, seed), 2 * config.max_steps)
            for seed in range(config.num_seeds)
        ]
        curve = {k: np.mean([run[k] for run in runs], axis=0) for k in runs[0]}
        curves[weight] = curve
        stopped = curve["loss"][config.max_steps - 1]
        converged = curve["converged loss"]
        row: Row = {
            "weight": weight,
            "spectral radius": float(curve["radius"]),
            "residual when stopped": float(curve["residual"][config.max_steps - 1]),
            "loss when stopped": float(stopped),
            "loss at equilibrium": float(converged),
            "lost by stopping": float(stopped / converged - 1),
        }
        rows.append(row)
    print_table(f"Stopped after {config.max_steps} evaluations", rows)
    promises = [
        promise(
            f"weight {row['weight']:g}: share of loss added by stopping",
            row["lost by stopping"],
            0.05,
        )
        for row in rows
        if row["weight"] > 0
    ]
    print_table("What the penalty promises", promises)
    save(config, "jacobian_penalty", {"rows": rows, "promises": promises}, draw(curves))


if __name__ == "__main__":
    main()
