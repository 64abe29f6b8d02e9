"""How accurate do two image networks get on all of Fashion-MNIST, in how long?

A residual network and the network of SciML's tutorial, each at a size and in a number
of epochs that take about half an hour. Trains them by their recipes, and keeps their
checkpoints and figures beside its results: started again, it goes on where it was.
"""

import dataclasses
import pathlib
import sys
from typing import Literal

import tyro

from ...kit.results import save, Settings
from ...kit.tables import print_table, Row
from ..data import load
from ..errors import RunError
from ..networks import num_parameters
from ..recipes import RECIPES
from ..records import read_records
from ..run import train


NETWORKS = {
    "resnet-fashion": "residual network",
    "tutorial-fashion": "SciML's tutorial",
}


@dataclasses.dataclass(frozen=True)
class FashionSettings(Settings):
    """Train on Fashion-MNIST."""

    data_dir: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Read the files of Fashion-MNIST from this folder."""
    recipes: tuple[Literal["resnet-fashion", "tutorial-fashion"], ...] = (
        "resnet-fashion",
        "tutorial-fashion",
    )
    """Train these networks."""
    train_size: int | None = None
    """Train only on so many images."""
    test_size: int | None = None
    """Test only on so many images."""


def train_recipe(name: str, settings: FashionSettings) -> list[Row]:
    """Train a network.

    There is a row for every epoch. Its seconds are those of the training up to then,
    without compilation and tests, and its evaluations the mean of the last steps.
    """
    _, recipe = RECIPES[name]
    config = dataclasses.replace(
        recipe,
        data=dataclasses.replace(
            recipe.data,
            data_dir=settings.data_dir,
            train_size=settings.train_size,
            test_size=settings.test_size,
        ),
        run=dataclasses.replace(recipe.run, output_dir=settings.output_dir / name),
    )
    state = train(config, load(config.data))
    records = read_records(config.output_dir / "metrics.jsonl")
    return [
        {
            "model": NETWORKS[name],
            "parameters": num_parameters(state.network),
            "epoch": record["epoch"],
            "accuracy (%)": 100 * record["test_accuracy"],
            "training (min)": record["seconds"] / 60,
            "an epoch (min)": record["seconds"] / record["epoch"] / 60,
            "evaluations, training": record["train_evaluations"],
            "evaluations, test": record["test_evaluations"],
            "converged, test (%)": 100 * record["test_converged"],
            "residual, test": record["test_residual"],
            "spectral radius": record["test_spectral_radius_mean"],
        }
        for record in records
        if "test_accuracy" in record
    ]


def main() -> None:
    settings = tyro.cli(FashionSettings)
    rows = []
    for name in settings.recipes:
        try:
            rows += train_recipe(name, settings)
        except RunError as error:
            sys.exit(f"Error: {error}")
        print_table(NETWORKS[name], rows)
    save(settings, "fashion", {"rows": rows})


if __name__ == "__main__":
    main()
