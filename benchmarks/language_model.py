"""Is an equilibrium worth more than as many layers with the same weights?

Trains the transformer on the characters of a text twice, for the same number of steps
of the same batches: once to its equilibrium, after some steps of pretraining, and once
as an ordinary transformer whose layers share their weights, as many as the equilibrium
took evaluations of the cell. Prints the bits that a character of the test text takes,
and the memory that a training step does.
"""

import dataclasses
import math
import pathlib
import sys

import tyro
from comparison import train
from config import Config, TrainingOptions
from data import DataError, DataOptions, load
from equilibrium import EquilibriumOptions
from measure import plt, print_table, save, Settings
from metrics import means
from networks import TransformerOptions
from optimiser import OptimiserOptions


@dataclasses.dataclass(frozen=True)
class LanguageSettings(Settings):
    """Compare an equilibrium with a stack of layers."""

    text: pathlib.Path = pathlib.Path("text.txt")
    """The file to learn; its last tenth is the test text."""
    test_size: int = 100_000
    """Test on so many characters only."""
    steps: int = 1000
    """Training steps of each model."""
    pretraining_steps: int = 300
    """Those of the equilibrium model with the cell unrolled three times."""
    batch_size: int = 16
    """Streams of text in a step, of which it sees 128 characters each."""
    model: TransformerOptions = TransformerOptions(dropout=0.0)
    """The sizes."""
    equilibrium: EquilibriumOptions = EquilibriumOptions(
        rtol=1e-2, max_steps=12, adjoint_rtol=1e-2, adjoint_max_steps=12
    )
    """The solver and the adjoint."""
    optimiser: OptimiserOptions = OptimiserOptions(
        learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip=0.25
    )
    """Of both models."""


def main() -> None:
    settings = tyro.cli(LanguageSettings)
    options = DataOptions(
        "text",
        data_dir=settings.text,
        level="character",
        test_size=settings.test_size,
    )
    try:
        data = load(options)
        steps_per_epoch = data.train.steps_per_epoch(settings.batch_size)
    except DataError as error:
        sys.exit(f"Error: {error}")
    options = TrainingOptions(
        pretraining_epochs=settings.pretraining_steps / steps_per_epoch,
        pretraining_depth=3,
        epochs=(settings.steps - settings.pretraining_steps) / steps_per_epoch,
        batch_size=settings.batch_size,
    )
    rows, histories = [], {}

    def add(name, options):
        config = Config(
            settings.model,
            equilibrium=settings.equilibrium,
            optimiser=settings.optimiser,
            training=options,
        )
        row, found, history = train(config, data, name)
        rows.append({**row, "bits per character": found["bits_per_token"]})
        histories[name] = [
            means([metrics])["loss"] / math.log(2) for metrics in history
        ]
        print_table(name, rows[-1:])

    add("equilibrium", options)
    depth = round(rows[0]["evaluations"])
    add(
        f"{depth} layers",
        dataclasses.replace(
            options,
            pretraining_epochs=settings.steps / steps_per_epoch,
            pretraining_depth=depth,
            epochs=0.0,
        ),
    )
    print_table("Language models", rows)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, history in histories.items():
        axis.plot(history, label=name, linewidth=0.8)
    axis.set(xlabel="training step", ylabel="bits per character", ylim=(None, 5))
    axis.legend()
    save(settings, "language_model", {"rows": rows}, figure)


if __name__ == "__main__":
    main()
