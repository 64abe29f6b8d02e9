import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import plot

from .helpers import dense_cell, make_vector


pytestmark = pytest.mark.one_precision


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_convergence():
    cell, xs = dense_cell(), jnp.stack([make_vector(4), make_vector(4, seed=2)])

    def trace(solver):
        one = jax.vmap(
            lambda x: inn.residual_trace(cell, solver, 0 * x, x, max_steps=30)
        )
        return one(xs)

    traces = {
        "Anderson": trace(inn.AndersonAcceleration(1e-3, 0.0)),
        "chord": trace(optx.Chord(1e-3, 1e-3)),
    }
    axes = plot.convergence(traces)
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["Anderson", "chord (steps)"]
    assert len(axes.collections) == 2
    line = axes.get_lines()[0]
    assert np.all(np.diff(np.asarray(line.get_xdata(), float)) >= 0)
    assert np.asarray(line.get_ydata(), float)[0] == pytest.approx(1)
    alone = jax.tree.map(lambda leaf: leaf[0], traces["Anderson"])
    assert len(plot.convergence({"one": alone}, axes=axes).get_lines()) == 3
    products = dataclasses.replace(alone, num_matvecs=alone.nfe)
    with_products = plot.convergence({"twice": products})
    assert "products" in with_products.get_xlabel()
    cost = np.asarray(with_products.get_lines()[0].get_xdata())
    assert np.array_equal(cost, 2 * np.asarray(alone.nfe)[: len(cost)])


def test_spectrum():
    rotation = jnp.array([[0.0, -0.5], [0.5, 0.0]])
    axes = plot.spectrum(lambda z, x: rotation @ z + x, jnp.ones(2), jnp.ones(2))
    assert axes.get_title() == "spectral radius 0.500"
    points = axes.get_lines()[1]
    assert sorted(np.asarray(points.get_ydata(), float)) == pytest.approx([-0.5, 0.5])


def test_solves():
    deq = inn.DeepEquilibriumNetwork(dense_cell(), max_steps=9)
    scales = 10.0 ** jnp.arange(-2.0, 4.0)
    solution = jax.vmap(deq.solve)(scales[:, None] * make_vector(4)[None, :])
    axes = plot.solves(solution)
    assert len(axes.patches) > 0
    _, text = axes.get_legend_handles_labels()
    success = int(jnp.sum(solution.result == optx.RESULTS.successful))
    assert text == [f"successful ({success})", f"failed ({6 - success})"]


def test_training():
    records = [{"step": 0, "loss": 2.0}, {"step": 1}, {"step": 2, "loss": 1.0}]
    (loss,) = plot.training(records, ["loss"]).get_lines()
    assert np.array_equal(loss.get_xdata(), [0, 2])
    assert np.array_equal(loss.get_ydata(), [2, 1])
    with pytest.raises(ValueError, match="'absent'; they have loss, step"):
        plot.training(records, ["loss", "absent"])
    with pytest.raises(ValueError, match="'epoch'; they have loss, step"):
        plot.training(records, ["loss"], against="epoch")


def test_matplotlib_is_imported_only_when_used():
    code = "import sys, implicitnets; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
