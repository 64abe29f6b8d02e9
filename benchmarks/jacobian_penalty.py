"""Does the Jacobian penalty make equilibria that survive being stopped early?

The synthetic regression of Bai et al., *Stabilizing Equilibrium Models by Jacobian
Regularization*, 2021, figure 3 and table 4: a state of one number, trained by six
Broyden steps with several weights of the penalty. Shows the residual and the test loss
after every evaluation, of Broyden's method and of plain iteration, over many seeds.

The paper states no range of the inputs. Here it is [-1, 1], where the cell fits the
curve nearly down to the noise in the given number of training steps, as it does in the
paper. On [-2, 2] it does not (`--x-max 2`: losses of 0.7 to 2, and seeds that differ
more than the weights).

Of one number, Broyden's method is the secant method, which takes any slope: six
evaluations are enough for every weight, zero included, so nothing is lost by stopping
there. What is lost is seen with plain iteration, whose rate is the slope itself.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import tyro
from jaxtyping import Array, Float, PRNGKeyArray

import implicitnets as inn

from .kit.results import save, Settings
from .kit.tables import print_table, Row
from .kit.timing import progress
from .training.fit import Clock, descend, fit


# Many more evaluations than any of the solves needs.
TO_CONVERGENCE = 200
SOLVERS = {
    "Broyden": inn.Broyden(rtol=0.0, atol=1e-6),
    "plain iteration": optx.FixedPointIteration(rtol=0.0, atol=1e-6),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Train on the synthetic task with and without the penalty."""

    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Compare these weights of the penalty with the first of them."""
    probability: float = 0.4
    """Compute the penalty in a training step with this probability."""
    epochs: int = 50
    """Train for so many epochs."""
    batch_size: int = 64
    """Use so many examples in a training step."""
    learning_rate: float = 1e-3
    """Start Adam's cosine schedule at this learning rate."""
    hidden: int = 50
    """Make the cell so wide."""
    max_steps: int = 6
    """Stop forward and backward solves after so many steps in training."""
    train_size: int = 4096
    """Train on so many examples."""
    test_size: int = 1000
    """Test on so many examples."""
    x_max: float = 1.0
    """Draw inputs between this number and its negative."""
    num_seeds: int = 10
    """Train so many times with each weight."""


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
    config: Config, size: int, *, key: PRNGKeyArray
) -> tuple[Float[Array, "size 1"], Float[Array, "size 1"]]:
    """The paper's curve with its noise."""
    x_key, noise_key = jr.split(key)
    x = jr.uniform(x_key, (size, 1), minval=-config.x_max, maxval=config.x_max)
    noise = 0.05 * jr.normal(noise_key, (size, 1))
    return x, 1.5 * x**3 + x**2 - 5 * x + 2 * jnp.sin(x) - 3 + noise


def train(config: Config) -> Cell:
    """Cells trained with every weight of the penalty, from every seed."""
    num_batches = config.train_size // config.batch_size
    schedule = optax.cosine_decay_schedule(
        config.learning_rate, config.epochs * num_batches
    )
    optimiser = optax.adam(schedule)
    solver = inn.Broyden(rtol=1e-3, atol=0.0, history_size=config.max_steps)
    linear_solver = inn.GivensGMRES(rtol=1e-4, atol=0.0, max_steps=config.max_steps)
    adjoint = inn.ImplicitAdjoint(linear_solver)

    def loss_fn(cell, weight, x, y, key):
        deq = inn.DeepEquilibriumNetwork(
            cell, solver, adjoint=adjoint, max_steps=config.max_steps
        )
        z = jax.vmap(deq)(x)

        def penalty(key):
            keys = jr.split(key, len(x))
            each = jax.vmap(lambda z, x, k: inn.jacobian_penalty(cell, z, x, key=k))
            return jnp.mean(each(z, x, keys))

        regular = inn.sometimes(config.probability, penalty, key=key)
        return jnp.mean((z - y) ** 2) + weight * regular, None

    gradient_fn = eqx.filter_grad(loss_fn, has_aux=True)

    @jax.vmap
    def start(seed):
        data_key, cell_key, key = jr.split(jr.key(seed), 3)
        cell: Any = Cell(config.hidden, key=cell_key)
        state = optimiser.init(eqx.filter(cell, eqx.is_array))
        data = make_data(config, config.train_size, key=data_key)
        return (cell, state), data, jr.split(key, config.epochs)

    @jax.vmap
    def batches(key):
        order_key, key = jr.split(key)
        rows = jr.permutation(order_key, config.train_size)
        rows = rows[: num_batches * config.batch_size].reshape(num_batches, -1)
        return rows, jr.split(key, num_batches)

    @eqx.filter_jit
    def update(carry, batch, weights, data):
        rows, keys = batch

        def of_seed(carry, rows, key, weight, data):
            xs, ys = data
            batch = weight, xs[rows], ys[rows], key
            return descend(gradient_fn, optimiser, *carry, *batch)[:2]

        of_weight = jax.vmap(of_seed, in_axes=(0, 0, 0, None, 0))
        every = jax.vmap(of_weight, in_axes=(0, None, None, 0, None))
        return every(carry, rows, keys, weights, data)

    carry, data, keys = start(jnp.arange(config.num_seeds))
    weights = jnp.array(config.weights)
    carry = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(weights), *leaf.shape)), carry
    )

    def every_batch():
        for epoch in progress(range(config.epochs), "epochs"):
            rows, batch_keys = batches(keys[:, epoch])
            for i in range(num_batches):
                yield rows[:, i], batch_keys[:, i]

    (cells, _), _ = fit(
        lambda carry, batch: (update(carry, batch, weights, data), None),
        carry,
        every_batch(),
        Clock(),
    )
    return cells


def evaluate(config: Config, cell: Cell) -> dict[str, dict[str, Array]]:
    """Means over the test set, for each solver after every evaluation."""
    x, y = make_data(config, config.test_size, key=jr.key(1000))

    def judge(z):
        f = jax.vmap(cell)(z, x)
        return {
            "residual": jnp.mean(jnp.abs(f - z) / jnp.abs(f)),
            "loss": jnp.mean((z - y) ** 2),
            "slope": jnp.mean(jnp.abs(jax.vmap(jax.jacobian(cell))(z, x))),
        }

    def states(solver):
        deq = inn.DeepEquilibriumNetwork(cell, solver, max_steps=TO_CONVERGENCE)
        at = range(1, 2 * config.max_steps + 1)
        return jax.vmap(lambda x: inn.sample_states(deq, x, at)[0])(x)

    *stopped, equilibrium = states(SOLVERS["Broyden"])
    *plain, _ = states(SOLVERS["plain iteration"])
    out = {"Broyden": stopped, "plain iteration": plain}
    out = {name: jax.vmap(judge)(jnp.stack(z)) for name, z in out.items()}
    return {**out, "equilibrium": judge(equilibrium)}


def curves(config: Config, runs: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    """Residual and loss after every evaluation: means over the seeds."""
    return [
        {
            "stopped solver": solver,
            "weight": weight,
            "evaluations": number + 1,
            "residual": float(runs[solver]["residual"][i, :, number].mean()),
            "loss": float(runs[solver]["loss"][i, :, number].mean()),
        }
        for solver in SOLVERS
        for i, weight in enumerate(config.weights)
        for number in range(2 * config.max_steps)
    ]


def compare(config: Config, runs: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    """Stopped solves next to equilibria: means over the seeds, and their spread."""

    def mean_and_spread(values):
        return f"{values.mean():.2g} ± {values.std():.1g}"

    rows = []
    for solver in SOLVERS:
        for i, weight in enumerate(config.weights):
            residual, loss = (
                runs[solver][name][i, :, config.max_steps - 1]
                for name in ("residual", "loss")
            )
            equilibrium_loss = runs["equilibrium"]["loss"][i]
            row: Row = {
                "stopped solver": solver,
                "weight": weight,
                "slope": mean_and_spread(runs["equilibrium"]["slope"][i]),
                "loss at equilibrium": mean_and_spread(equilibrium_loss),
                "loss when stopped": mean_and_spread(loss),
                "lost by stopping": float(loss.mean() / equilibrium_loss.mean() - 1),
                "residual when stopped": float(residual.mean()),
            }
            rows.append(row)
    return rows


def main() -> None:
    config = tyro.cli(Config)

    cells = train(config)
    every_cell = jax.jit(jax.vmap(jax.vmap(lambda cell: evaluate(config, cell))))
    runs = jax.tree.map(np.asarray, every_cell(cells))
    rows = compare(config, runs)
    print_table(f"Stopped after {config.max_steps} evaluations", rows)
    tables = {"rows": rows, "curves": curves(config, runs)}
    save(config, "jacobian_penalty", tables)


if __name__ == "__main__":
    main()
