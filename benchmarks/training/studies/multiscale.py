"""Are several scales worth more than one of the same number of weights?

Trains the smallest multiscale network of Bai et al. (2020) on the images of
Fashion-MNIST, and the same network with the finest of its scales alone, which has as
many more channels as make up for the weights of the other. Both see the same batches in
the same number of steps, of which the first ones are pretraining. They are trained with
the Jacobian-free gradient, the penalty on the Jacobian, and eight steps of Anderson
acceleration, so that many training steps fit into little time.
"""

import dataclasses
import pathlib
import statistics
import sys

import tyro

from implicitnets import models

from ...kit.results import save, Settings
from ...kit.tables import print_table, Row
from ..comparison import curve, train
from ..config import Config, JacobianOptions, TrainingOptions
from ..data import DataOptions, load
from ..equilibrium import EquilibriumOptions
from ..errors import DataError
from ..optimiser import OptimiserOptions
from ..recipes import CONTRACT, FEW_STEPS


MODELS = {
    "two scales": models.MDEQConfig(),
    "one scale": models.MDEQConfig((36,), (20,), final_channels=215, groups=4),
}


@dataclasses.dataclass(frozen=True)
class MultiscaleSettings(Settings):
    """Compare two scales with one."""

    data_dir: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Read the files of Fashion-MNIST from this folder."""
    train_size: int = 4800
    """Train only on so many images."""
    test_size: int = 2000
    """Test only on so many images."""
    epochs: float = 3.0
    """Train for so many epochs after the pretraining."""
    pretraining_epochs: float = 0.5
    """Train for so many epochs with the cell unrolled three times."""
    batch_size: int = 32
    """Use so many images in a training step."""
    seeds: int = 1
    """Train so many times, with other weights and batches."""
    equilibrium: EquilibriumOptions = FEW_STEPS
    """The solver and the adjoint."""
    jacobian: JacobianOptions = CONTRACT
    """The penalty that keeps the equilibrium within reach of the solver's steps."""
    optimiser: OptimiserOptions = OptimiserOptions(
        learning_rate=2e-3, schedule="cosine", warmup_steps=50
    )
    """Train both models by this optimiser."""

    def __post_init__(self):
        for name in ("epochs", "seeds"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"`{name}` must be positive; got {value}.")


def over_seeds(rows: list[Row]) -> Row:
    """The means of the rows of a model, and how far its accuracies are apart."""
    accuracies = [row["accuracy (%)"] for row in rows]
    summary = {
        name: statistics.mean(row[name] for row in rows)
        for name, value in rows[0].items()
        if isinstance(value, float)
    }
    return {
        "model": rows[0]["model"],
        "parameters": rows[0]["parameters"],
        **summary,
        "of each seed (%)": "  ".join(f"{accuracy:.1f}" for accuracy in accuracies),
    }


def main() -> None:
    settings = tyro.cli(MultiscaleSettings)
    options = DataOptions(
        "fashion_mnist",
        data_dir=settings.data_dir,
        train_size=settings.train_size,
        test_size=settings.test_size,
        standardise=True,
    )
    try:
        data = load(options)
        data.train.steps_per_epoch(settings.batch_size)  # of which there must be one
    except DataError as error:
        sys.exit(f"Error: {error}")
    rows, histories = [], {}
    for seed in range(settings.seeds):
        for name in MODELS:
            config = Config(
                MODELS[name],
                equilibrium=settings.equilibrium,
                optimiser=settings.optimiser,
                jacobian=settings.jacobian,
                training=TrainingOptions(
                    pretraining_epochs=settings.pretraining_epochs,
                    pretraining_depth=3,
                    epochs=settings.epochs,
                    batch_size=settings.batch_size,
                    seed=seed,
                ),
            )
            row, found, history = train(config, data, name)
            accuracy = 100 * found["accuracy"]
            rows.append({**row, "seed": seed, "accuracy (%)": accuracy})
            histories.setdefault(name, []).append(history)
            print_table(f"{name}, seed {seed}", rows[-1:])
    summaries = [
        over_seeds([row for row in rows if row["model"] == name]) for name in MODELS
    ]
    print_table("Fashion-MNIST", summaries)
    columns = "loss", "evaluations"
    curves = [
        row for name, seeds in histories.items() for row in curve(name, seeds, *columns)
    ]
    tables = {"rows": rows, "summary": summaries, "curves": curves}
    save(settings, "multiscale", tables)


if __name__ == "__main__":
    main()
