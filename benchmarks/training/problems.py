"""The benchmarks' problems by name, with a cell that is trained here."""

import dataclasses
import functools as ft
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kit import problems
from ..kit.problems import Problem


def trained_cell(folder: pathlib.Path, num_images: int = 128) -> Problem:
    """The cell of SciML's tutorial, trained on digits, at its test images."""
    path = folder / "trained_cell.npz"
    if path.exists():
        return problems.load(path)
    # They need the extra `train`, and the other problems do not.
    from .data import load
    from .fit import fit
    from .recipes import RECIPES
    from .trainer import Trainer

    _, recipe = RECIPES["tutorial"]
    training = dataclasses.replace(recipe.training, epochs=10, spectral_examples=0)
    config = dataclasses.replace(recipe, training=training)
    trainer = Trainer(config, load(config.data))
    steps = range(trainer.plan.total_steps)
    state, _ = fit(trainer.train_step, trainer.start(), steps, trainer.clock)
    network: Any = state.network
    cell = network.layer.cell
    test_set: Any = trainer.data.test
    images, _ = test_set[:num_images].numbers()
    problem = problems.make_problem(
        "trained cell",
        "tutorial",
        {name: getattr(cell, name).weight for name in ("state", "inject", "mix")},
        np.asarray(jax.vmap(network.model.stem)(jnp.asarray(images))),
        1e-4,
        np.random.default_rng(0),
    )
    folder.mkdir(parents=True, exist_ok=True)
    problem.save(path)
    return problem


def _without_folder(make: Callable[[], Problem], folder: pathlib.Path) -> Problem:
    del folder
    return make()


# Given the folder in which trained weights are kept.
PROBLEMS: dict[str, Callable[[pathlib.Path], Problem]] = {
    **{
        name: ft.partial(_without_folder, make)
        for name, make in problems.PROBLEMS.items()
    },
    "trained": trained_cell,
}
