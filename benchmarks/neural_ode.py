"""What does a neural ODE cost next to a discrete and a continuous DEQ of the same cell?

Each is trained from the same initial weights, for its own accuracy; then all are run at
the same weights, those of the trained discrete DEQ, to the same tolerance: evaluations,
times forward and backward, and temporary memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from jaxtyping import Array

import implicitnets as inn

from .kit.results import save
from .kit.tables import print_table, Row
from .kit.timing import compile_and_run, progress, time_calls
from .training.classifier import (
    Dataset,
    evaluate,
    Model,
    TOLERANCE,
    train,
    TrainingSettings,
    Weights,
    WIDTH,
)


MAX_STEPS = 256
TIMING_BATCH = 128


@dataclasses.dataclass(frozen=True)
class Config(TrainingSettings):
    """Compare neural ODEs with equilibrium networks."""


def models() -> list[tuple[str, Model]]:
    """Kinds and models. The first one's weights are for all."""

    def equilibrium(solver):
        return lambda weights: inn.DeepEquilibriumNetwork(
            weights.cell, solver, max_steps=MAX_STEPS
        )

    def neural_ode(t1, adjoint):
        return lambda weights: inn.NeuralODE(
            weights.cell,
            dfx.Tsit5(),
            t1=t1,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )

    discrete = {
        "Broyden": inn.Broyden(TOLERANCE, TOLERANCE),
        "Anderson": inn.AndersonAcceleration(TOLERANCE, TOLERANCE),
    }
    continuous = {
        type(solver).__name__: inn.SteadyState(solver, TOLERANCE, TOLERANCE)
        for solver in (dfx.Tsit5(), inn.VCABM3())
    }
    controller = dfx.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
    checkpointed = dfx.RecursiveCheckpointAdjoint()
    backsolve = dfx.BacksolveAdjoint(stepsize_controller=controller)
    # Backwards from time 10, where the flow is at rest, it is too unstable to solve.
    neural = {
        "Tsit5 to time 1, checkpointed": neural_ode(1.0, checkpointed),
        "Tsit5 to time 1, solved backwards": neural_ode(1.0, backsolve),
        "Tsit5 to time 10, checkpointed": neural_ode(10.0, checkpointed),
    }
    found = []
    for kind, solvers in (("discrete DEQ", discrete), ("continuous DEQ", continuous)):
        found += [(kind, Model(n, equilibrium(s))) for n, s in solvers.items()]
    found += [("neural ODE", Model(n, layer)) for n, layer in neural.items()]
    return found


def measure(
    model: Model, weights: Weights, images: Array, cotangent: Array
) -> tuple[Row, dict[str, Callable[[], Any]]]:
    """The memory of a gradient, and what is to be timed."""

    def solve(weights):
        return model.solve(weights, images).z_star

    def gradient(weights):
        return jax.vjp(solve, weights)[1](cotangent)

    forward, _ = compile_and_run(solve, weights)
    whole, _ = compile_and_run(gradient, weights)
    row: Row = {
        "temp (MB)": whole.temp_bytes / 1e6,
        "first result (s)": whole.first_seconds,
    }
    return row, {"forward": forward.call, "gradient": whole.call}


def compare(config: Config, dataset: Dataset) -> list[Row]:
    """All models on one data set."""
    train_set, test_set = config.load(dataset)
    images = jnp.asarray(test_set[0][:TIMING_BATCH])
    cotangent = jr.normal(jr.key(0), (len(images), WIDTH))
    rows, calls, shared = [], {}, None
    for i, (kind, model) in enumerate(progress(models(), dataset)):
        weights, seconds = train(config, model, train_set)
        shared = weights if shared is None else shared
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), weights, shared)
        found = evaluate(model, both, test_set)
        own = {name: values[: config.seeds] for name, values in found.items()}
        same = {name: values[config.seeds :] for name, values in found.items()}
        first = jax.tree.map(lambda leaf: leaf[0], shared)
        row, passes = measure(model, first, images, cotangent)
        rows.append(
            {
                "data": dataset,
                "kind": kind,
                "model": model.name,
                "accuracy (%)": 100 * float(own["accuracy"].mean()),
                "training step (ms)": 1e3 * seconds / config.seeds,
                "accuracy, same weights (%)": 100 * float(same["accuracy"].mean()),
                "evaluations": float(same["evaluations"].mean()),
                "residual": float(same["residual"].mean()),
                **row,
            }
        )
        calls.update({(i, name): call for name, call in passes.items()})
    seconds = time_calls(calls, config.repeats, f"{dataset}, timing")
    for i, row in enumerate(rows):
        forward, gradient = seconds[i, "forward"], seconds[i, "gradient"]
        row["forward (ms)"] = 1e3 * forward
        row["backward (ms)"] = 1e3 * (gradient - forward)
    return rows


def main() -> None:
    config = tyro.cli(Config)
    dataset = config.datasets[-1]
    rows = compare(config, dataset)
    print_table(dataset, rows)
    save(config, "neural_ode", {"rows": rows})


if __name__ == "__main__":
    main()
