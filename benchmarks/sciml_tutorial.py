"""How long does SciML's tutorial take, with every solver and every start of a solve?

The protocol of *Training a Simple MNIST Classifier using Deep Equilibrium Models*:
2,000 images to train on and 500 to test on, batches of 32, two epochs with the cell
unrolled five times, then three with the equilibrium. The images are Fashion-MNIST's,
which have the shape of MNIST's. A combination is compiled once; its seeds differ in the
weights, and see the same batches.
"""

import dataclasses
import pathlib
import statistics
import time
from typing import get_args

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import tyro
from data import Data, DataOptions, load
from equilibrium import EquilibriumOptions, SolverName
from measure import bar_figure, print_table, progress, Row, save, Settings
from networks import build, TutorialOptions
from recipes import RECIPES
from trainer import Trainer, TrainState
from tutorial import mnist


# From the log on the tutorial's page of 10 September 2024: MNIST, on an NVIDIA GPU.
# Compiling is what its first calls took, forward and backward.
REFERENCE: list[Row] = [
    {
        "model": "skipregdeq",
        "phase": "pretraining",
        "compile (s)": 81,
        "accuracy (%)": 66.6,
    },
    {
        "model": "skipregdeq",
        "phase": "newton-krylov",
        "compile (s)": 102,
        "epoch (s)": 5.25,
        "accuracy (%)": 76.2,
    },
    {"model": "deq", "phase": "pretraining", "accuracy (%)": 64.4},
    {
        "model": "deq",
        "phase": "adams",
        "compile (s)": 42,
        "epoch (s)": 12.5,
        "accuracy (%)": 70.8,
    },
]


@dataclasses.dataclass(frozen=True)
class TutorialSettings(Settings):
    """Train every combination."""

    data_dir: pathlib.Path = pathlib.Path("fashion-mnist")
    """The folder with the files of Fashion-MNIST."""
    model_types: tuple[mnist.ModelType, ...] = get_args(mnist.ModelType)
    """Where a solve starts."""
    solvers: tuple[SolverName, ...] = (
        "newton-krylov",
        "broyden",
        "anderson",
        "tsit5",
        "adams",
    )
    """What finds the equilibrium."""
    seeds: int = 5
    """How many times to train every combination."""


def make_trainer(data: Data, model: mnist.ModelType, solver: SolverName) -> Trainer:
    """The steps of one combination."""
    _, recipe = RECIPES["tutorial"]
    training = dataclasses.replace(recipe.training, spectral_examples=0)
    config = dataclasses.replace(
        recipe,
        model=TutorialOptions(model_type=model),
        equilibrium=EquilibriumOptions(solver),
        training=training,
    )
    return Trainer(config, data)


def start(trainer: Trainer, seed: int) -> TrainState:
    """The state before the first step, with the weights of a seed."""
    config = trainer.config
    network, _ = build(config.model, config.equilibrium, trainer.data, key=jr.key(seed))
    return dataclasses.replace(trainer.start(), network=network)


def with_arrays_of(state: TrainState, other: TrainState) -> TrainState:
    """A combination's state with the arrays of another solver's."""
    arrays, rest = eqx.partition(state, eqx.is_array)
    leaves = jtu.tree_leaves(eqx.filter(other, eqx.is_array))
    return eqx.combine(jtu.tree_unflatten(jtu.tree_structure(arrays), leaves), rest)


def run(
    trainer: Trainer, states: list[TrainState], steps: range
) -> tuple[list[TrainState], Row]:
    """One phase of the training, from every seed.

    **Arguments:**

    - `trainer`: of the combination.
    - `states`: of every seed, before the phase.
    - `steps`: of the phase.

    **Returns:**

    The states after it, and its columns of the table.
    """
    num_epochs = len(steps) / trainer.plan.steps_per_epoch
    ends, seconds, found, compile_seconds = [], [], [], 0.0
    for state in states:
        compiled, start = trainer.compile_seconds, time.perf_counter()
        for step in steps:
            state, _ = trainer.train_step(state, step)
        jax.block_until_ready(state.step)
        compiled = trainer.compile_seconds - compiled
        compile_seconds += compiled  # of the first seed: the others find it compiled
        seconds.append((time.perf_counter() - start - compiled) / num_epochs)
        found.append(trainer.test(state))
        ends.append(state)
    accuracies = [100 * metrics["accuracy"] for metrics in found]
    return ends, {
        "compile (s)": compile_seconds,
        "epoch (s)": statistics.mean(seconds),
        "accuracy (%)": statistics.mean(accuracies),
        "of each seed (%)": "  ".join(f"{accuracy:.1f}" for accuracy in accuracies),
        "evaluations": statistics.mean(metrics["evaluations"] for metrics in found),
        "converged (%)": 100
        * statistics.mean(metrics["converged"] for metrics in found),
    }


def main() -> None:
    settings = tyro.cli(TutorialSettings)
    options = DataOptions(
        "fashion_mnist", data_dir=settings.data_dir, train_size=2000, test_size=500
    )
    data = load(options)
    rows = []
    for model in settings.model_types:
        # The solver plays no part in the pretraining.
        trainer = make_trainer(data, model, settings.solvers[0])
        plan = trainer.plan
        states = [start(trainer, seed) for seed in range(settings.seeds)]
        states, row = run(trainer, states, range(plan.pretraining_steps))
        rows.append({"model": model, "phase": "pretraining"} | row)
        print_table(model, rows[-1:])
        for solver in progress(settings.solvers, model):
            trainer = make_trainer(data, model, solver)
            _, row = run(
                trainer,
                [with_arrays_of(trainer.start(), state) for state in states],
                range(plan.pretraining_steps, plan.total_steps),
            )
            rows.append({"model": model, "phase": solver} | row)
            print_table(f"{model}, {solver}", rows[-1:])
    print_table("Fashion-MNIST, this machine", rows)
    print_table("MNIST, the log of the tutorial", REFERENCE)
    figure = bar_figure(
        rows, panel="model", label="phase", values=["epoch (s)"], unit="seconds"
    )
    save(settings, "sciml_tutorial", {"rows": rows, "reference": REFERENCE}, figure)


if __name__ == "__main__":
    main()
