"""Is an equilibrium worth more than as many layers with the same weights?

Trains the transformer on the characters of a text twice, for the same number of steps
of the same batches: once to its equilibrium, after some steps of pretraining, and once
as an ordinary transformer whose layers share their weights, as many as the equilibrium
took evaluations of the cell in its last training steps. Prints the bits that a
character of the test text takes, and the memory that a training step does.
"""

import dataclasses
import math
import pathlib
import sys

from implicitnets import models

from ...kit.results import save, Settings
from ...kit.tables import print_table
from ..command_line import parse_settings
from ..comparison import curve, train
from ..config import Config, JacobianOptions, TrainingOptions
from ..data import DataOptions, load
from ..equilibrium import EquilibriumOptions
from ..errors import DataError
from ..optimiser import OptimiserOptions
from ..recipes import SMALL_TRANSFORMER


BITS = "bits per character"


@dataclasses.dataclass(frozen=True)
class LanguageSettings(Settings):
    """Compare an equilibrium with a stack of layers."""

    text: pathlib.Path = pathlib.Path("text.txt")
    """Learn the text of this file. Its last tenth is the test text."""
    test_size: int = 100_000
    """Test only on so many characters."""
    steps: int = 1000
    """Train each model for so many steps."""
    pretraining_steps: int = 300
    """Unroll the cell in so many of the first steps of the equilibrium model."""
    pretraining_depth: int = 3
    """Unroll the cell so many times."""
    batch_size: int = 16
    """Use 128 characters each of so many streams of text in a training step."""
    model: models.TransformerConfig = dataclasses.replace(
        SMALL_TRANSFORMER, dropout=0.0
    )
    """The sizes."""
    equilibrium: EquilibriumOptions = EquilibriumOptions(
        rtol=1e-2,
        max_steps=12,
        # A character sees later ones by less than the last digit of the bits.
        test_rtol=1e-4,
        test_max_steps=100,
        adjoint_rtol=1e-2,
        adjoint_max_steps=12,
    )
    """The solver, with another tolerance in the test, and the adjoint."""
    jacobian: JacobianOptions = JacobianOptions(
        jacobian_weight=2.0, jacobian_probability=0.4
    )
    """The penalty that keeps the equilibrium within reach of the solver's steps; the
    stack of layers has none."""
    optimiser: OptimiserOptions = OptimiserOptions(
        learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip=0.25
    )
    """Of both models."""


def main() -> None:
    settings = parse_settings(LanguageSettings())
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
        pretraining_depth=settings.pretraining_depth,
        epochs=(settings.steps - settings.pretraining_steps) / steps_per_epoch,
        batch_size=settings.batch_size,
    )
    rows, curves = [], []

    def add(name, options, jacobian):
        config = Config(
            settings.model,
            equilibrium=settings.equilibrium,
            optimiser=settings.optimiser,
            jacobian=jacobian,
            training=options,
        )
        row, found, history = train(config, data, name)
        rows.append({**row, BITS: found["bits_per_token"]})
        for point in curve(name, [history], "loss", "evaluations"):
            curves.append({**point, BITS: point["loss"] / math.log(2)})
        print_table(name, rows[-1:])

    add("equilibrium", options, settings.jacobian)
    depth = round(rows[0]["evaluations in training"])
    add(
        f"{depth} layers",
        dataclasses.replace(
            options,
            pretraining_epochs=settings.steps / steps_per_epoch,
            pretraining_depth=depth,
            epochs=0.0,
        ),
        JacobianOptions(),
    )
    print_table("Language models", rows)
    save(settings, "language_model", {"rows": rows, "curves": curves})


if __name__ == "__main__":
    main()
