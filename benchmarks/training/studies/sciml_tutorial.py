"""How long does SciML's tutorial take, with every solver and every start of a solve?

The protocol of *Training a Simple MNIST Classifier using Deep Equilibrium Models*: of
the first 2,500 training images 2,000 to train on and 500 to test on, 63 batches of at
most 32 an epoch, two epochs with the cell unrolled five times, then three with the
equilibrium, for which solver and linear solver have ten steps. What differs:

- The images are Fashion-MNIST's, which have the shape of MNIST's, so that accuracies
  cannot be compared with the tutorial's.
- The last batch of an epoch, of 16 images, is filled up with images that count nothing:
  one shape, one compilation.
- A solve stops by the library's rule, every image on its own at a relative residual of
  1e-3 in the two-norm. There a batch stops as one, at a residual of 1e-3 in the largest
  of its elements.

A combination is compiled once; its seeds differ in the weights, and see the same
batches. Times are of the training alone, without the tests. The whole of it takes some
hours on two cores, and may be done in parts: what is in the JSON file, with the same
settings on the same machine, is not done again.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any, get_args

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
import tyro

from ...kit.results import machine, save, Settings, versions
from ...kit.tables import print_table, Row
from ...kit.timing import progress
from ..data import Data, DataOptions, load
from ..equilibrium import EquilibriumOptions, SolverName
from ..errors import DataError
from ..fit import fit
from ..networks import build
from ..recipes import RECIPES
from ..sciml import ModelType, SciMLConfig
from ..trainer import Trainer, TrainState


# From the log on the tutorial's page of 10 September 2024: MNIST, on an NVIDIA GPU.
# Compiling is what its first calls took, forward and backward.
REFERENCE: dict[tuple[ModelType, str], Row] = {
    ("skipregdeq", "pretraining"): {"compile (s)": 81, "accuracy (%)": 66.6},
    ("skipregdeq", "newton-krylov"): {
        "compile (s)": 102,
        "epoch (s)": 5.25,
        "accuracy (%)": 76.2,
    },
    ("deq", "pretraining"): {"accuracy (%)": 64.4},
    ("deq", "adams"): {"compile (s)": 42, "epoch (s)": 12.5, "accuracy (%)": 70.8},
}
NAME = "sciml_tutorial"


@dataclasses.dataclass(frozen=True)
class TutorialSettings(Settings):
    """Train every combination."""

    data_dir: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Read the files of Fashion-MNIST from this folder."""
    model_types: tuple[ModelType, ...] = get_args(ModelType)
    """Start solves in these ways."""
    solvers: tuple[SolverName, ...] = (
        "newton-krylov",
        "broyden",
        "anderson",
        "tsit5",
        "adams",
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
        """The rows, with the figures that the tutorial has of some."""
        return [
            entry["row"]
            | {
                f"DeepEquilibriumNetworks.jl: {name}": value
                for name, value in REFERENCE.get(_name(entry["row"]), {}).items()
            }
            for entry in self._entries
        ]

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
        save(self._settings, NAME, {"rows": self.rows, "entries": self._entries})


def _name(row):
    return row["model"], row["phase"]


def load_images(folder: pathlib.Path) -> Data:
    """The tutorial's split of the first training images."""
    options = DataOptions(
        "fashion_mnist", data_dir=folder, train_size=2500, keep_rest=True
    )
    data = load(options)
    return dataclasses.replace(data, train=data.train[:2000], test=data.train[2000:])


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
    num_epochs = len(steps) / trainer.plan.steps_per_epoch
    clock, compiled = trainer.clock, trainer.clock.compile_seconds
    ends, seconds = [], []
    for state in states:
        start = clock.seconds
        ends.append(fit(trainer.train_step, state, steps, clock)[0])
        seconds.append(clock.seconds - start)
    # Of the first seed: the others find the step compiled.
    compile_seconds = clock.compile_seconds - compiled
    found = [trainer.test(state) for state in ends]
    accuracies = [100 * metrics["accuracy"] for metrics in found]
    phase_seconds = statistics.mean(seconds)

    def mean(name):
        return statistics.mean(metrics[name] for metrics in found)

    return ends, {
        "compile (s)": compile_seconds,
        "epoch (s)": phase_seconds / num_epochs,
        "total (s)": before["total (s)"] + phase_seconds,
        "total with compilation (s)": before["total with compilation (s)"]
        + phase_seconds
        + compile_seconds,
        "accuracy (%)": statistics.mean(accuracies),
        "deviation (%)": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "of each seed (%)": "  ".join(f"{accuracy:.1f}" for accuracy in accuracies),
        "evaluations": mean("evaluations"),
        "products": mean("products") if "products" in found[0] else None,
        "converged (%)": 100 * mean("converged"),
    }


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
    try:
        data = load_images(settings.data_dir)
    except DataError as error:
        sys.exit(f"Error: {error}")
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
    print_table("Fashion-MNIST", table.rows)


if __name__ == "__main__":
    main()
