"""Do Skip DEQs need fewer evaluations than plain ones, at equal accuracy?

The experiment of Pal et al. (see `classifier.py`) with a discrete and with a continuous
solver: a DEQ that starts at zero, with and without the Jacobian penalty, one that
starts where a learned layer says, and one that starts at the cell's value at zero.

The paper's penalty is the mean distance of equilibrium and start, times five, in 47,000
steps. In 1,000 steps that is too much, so the weight is one; a learned start is also
trained with the paper's weight, and with a penalty that trains it and nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import tyro

import implicitnets as inn

from .kit.results import save
from .kit.tables import print_table, Row
from .kit.timing import compile_and_run, progress, time_calls
from .training.classifier import (
    Dataset,
    evaluate,
    MAX_STEPS,
    Model,
    TOLERANCE,
    train,
    TrainingSettings,
    Weights,
)
from .training.data import Batch


SKIP_WEIGHT = 1.0
PAPERS_WEIGHT = 5.0
JACOBIAN_WEIGHT = 1.0
SKIP_REG = "Skip-regularised"


@dataclasses.dataclass(frozen=True)
class Config(TrainingSettings):
    """Compare plain, Skip and Skip-regularised DEQs."""


def solvers() -> dict[str, Any]:
    """One of each kind, as in the paper."""
    return {
        "Broyden": inn.Broyden(TOLERANCE, TOLERANCE),
        "Tsit5": inn.SteadyState(dfx.Tsit5(), TOLERANCE, TOLERANCE),
    }


def models(solver: Any) -> list[Model]:
    """The kinds of DEQ with one solver."""

    def plain(weights: Weights):
        return inn.DeepEquilibriumNetwork(weights.cell, solver, max_steps=MAX_STEPS)

    def skip(predict: Callable[[Weights], Callable | None]):
        return lambda weights: inn.SkipDeepEquilibriumNetwork(
            weights.cell, solver, init=predict(weights), max_steps=MAX_STEPS
        )

    learned = skip(lambda weights: lambda x: jax.nn.relu(weights.start(x)))
    alone = skip(
        lambda weights: lambda x: jax.nn.relu(weights.start(lax.stop_gradient(x)))
    )
    return [
        Model("plain", plain),
        Model("plain, Jacobian penalty", plain, jacobian_weight=JACOBIAN_WEIGHT),
        Model("Skip", learned, SKIP_WEIGHT),
        Model(f"Skip, weight {PAPERS_WEIGHT:.0f}", learned, PAPERS_WEIGHT),
        Model("Skip, only the start learns", alone, SKIP_WEIGHT, attract=False),
        Model(SKIP_REG, skip(lambda _: None), SKIP_WEIGHT),
    ]


def compare(
    config: Config, dataset: Dataset, solver_name: str, solver: Any
) -> list[Row]:
    """The kinds of DEQ with one solver on one data set."""
    train_set, test_set = config.load(dataset)
    rows, calls = [], {}
    for model in progress(models(solver), f"{dataset}, {solver_name}"):
        weights, seconds = train(config, model, train_set)
        found = evaluate(model, weights, test_set)
        # The solver does not know of the evaluation that gives the start.
        evaluations = found["evaluations"] + (model.name == SKIP_REG)
        rows.append(
            {
                "data": dataset,
                "solver": solver_name,
                "model": model.name,
                "accuracy (%)": 100 * float(found["accuracy"].mean()),
                "deviation of accuracy": 100 * float(found["accuracy"].std()),
                "evaluations": float(evaluations.mean()),
                "deviation of evaluations": float(evaluations.std()),
                "converged (%)": 100 * float(found["converged"].mean()),
                "silent elements (%)": 100 * float(found["silent"].mean()),
                "training step (ms)": 1e3 * seconds / config.seeds,
            }
        )
        calls[model.name] = prediction(model, weights, test_set)
    seconds = time_calls(calls, config.repeats, f"{dataset}, {solver_name}, timing")
    return [{**row, "prediction (ms)": 1e3 * seconds[row["model"]]} for row in rows]


def prediction(model: Model, weights: Weights, test_set: Batch) -> Callable[[], Any]:
    """The classes of a test batch at the first seed's weights, to be timed."""

    def predict(weights, images):
        z_star = model.solve(weights, images).z_star
        return jnp.argmax(jax.vmap(weights.head)(z_star), axis=1)

    first = jax.tree.map(lambda leaf: leaf[0], weights)
    compiled, _ = compile_and_run(predict, first, np.asarray(test_set[0][:128]))
    return compiled.call


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for dataset in config.datasets:
        for name, solver in solvers().items():
            new_rows = compare(config, dataset, name, solver)
            print_table(f"{dataset}, {name}", new_rows)
            rows += new_rows
    save(config, "skip", {"rows": rows})


if __name__ == "__main__":
    main()
