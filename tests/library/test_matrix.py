"""Every kind of solver, layer, penalty and cell, as in the test matrix of SciML's
DeepEquilibriumNetworks.jl, whose tolerances these are."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from .helpers import JointCell, multiscale_layers, SumCell


# SciML's are in single precision, and a tolerance of 1e-3 asks for no more.
pytestmark = pytest.mark.one_precision

TOL = 1e-3

SOLVERS = {
    "vcabm3": inn.SteadyState(inn.VCABM3(), rtol=0.0, atol=TOL),
    "tsit5": inn.SteadyState(dfx.Tsit5(), rtol=0.0, atol=TOL),
    "newton": optx.Newton(TOL, TOL),
    "broyden": inn.Broyden(rtol=0.0, atol=TOL),
}
KINDS = ("plain", "skip", "skipreg")
BATCH_SIZE = 2
SCALES = (3, 2)


class Init(eqx.Module):
    """A layer for every leaf of the state."""

    layers: dict[str, Any]

    def __call__(self, x):
        scales = tuple(layer(x["multiscale"]) for layer in self.layers["multiscale"])
        singles = {name: self.layers[name](x[name]) for name in ("dense", "conv")}
        return {**singles, "multiscale": scales}


def zero_state(x):
    return {**jtu.tree_map(jnp.zeros_like, x), "multiscale": (*map(jnp.zeros, SCALES),)}


def make_layer(kind, solver):
    """A layer of a vector, an image and two scales, and a batch of inputs."""
    keys = iter(jr.split(jr.key(0), 12))

    def linear():
        return eqx.nn.Linear(2, 2, key=next(keys))

    def conv():
        return eqx.nn.Conv2d(3, 3, 1, key=next(keys))

    cells = {
        "dense": SumCell(linear(), linear()),
        "conv": SumCell(conv(), conv()),
        "multiscale": inn.MultiScaleCell(*multiscale_layers(SCALES, key=next(keys))),
    }
    cell = jtu.tree_map(lambda w: 0.3 * w if eqx.is_array(w) else w, JointCell(cells))
    scales = [eqx.nn.Linear(SCALES[0], size, key=next(keys)) for size in SCALES]
    init = Init({"dense": linear(), "conv": conv(), "multiscale": scales})
    xs = {
        "dense": jr.normal(next(keys), (BATCH_SIZE, 2)),
        "conv": jr.normal(next(keys), (BATCH_SIZE, 3, 2, 2)),
        "multiscale": jr.normal(next(keys), (BATCH_SIZE, SCALES[0])),
    }
    match kind:
        case "plain":
            layer = inn.DeepEquilibriumNetwork(cell, solver, zero_state=zero_state)
        case "skip":
            layer = inn.SkipDeepEquilibriumNetwork(cell, solver, init=init)
        case _:
            layer = inn.SkipDeepEquilibriumNetwork(cell, solver, zero_state=zero_state)
    return layer, xs


@eqx.filter_jit
def run(layer, xs):
    """Solutions and gradients of a batch, without the penalty and with it."""

    def loss(params, weight):
        layer, x = params
        sol = layer.solve(x)
        penalty = inn.jacobian_penalty(layer.cell, sol.z_star, x, key=jr.key(1))
        squares = optx.two_norm(sol.z_star) ** 2
        return squares + weight * penalty + inn.skip_penalty(sol), sol

    def of_example(weight, x):
        gradient = eqx.filter_value_and_grad(loss, has_aux=True)
        (_, sol), gradients = gradient((layer, x), weight)
        return sol, gradients

    twice = jtu.tree_map(lambda leaf: jnp.concatenate([leaf, leaf]), xs)
    weights = jnp.repeat(jnp.array([0.0, 100.0]), BATCH_SIZE)
    return jax.vmap(of_example)(weights, twice)


def check(kind, layer, xs):
    """What holds in every case; returns the solutions."""
    sol, (layer, x) = run(layer, xs)
    for leaf in jtu.tree_leaves((sol, layer, x)):
        assert np.all(np.isfinite(leaf))
    for leaf in jtu.tree_leaves(x):
        assert np.all(np.any(leaf != 0, axis=tuple(range(1, leaf.ndim))))
    for leaf in jtu.tree_leaves(layer.cell):
        without, with_penalty = np.split(leaf, 2)
        assert not np.allclose(without, with_penalty, rtol=1e-3, atol=1e-6)
    for leaf in jtu.tree_leaves(layer.init):
        assert np.any(leaf != 0)
    for leaf in jtu.tree_leaves(sol.z0):
        assert np.any(leaf != 0) == (kind != "plain")
    return sol


@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_solve(kind, solver_name):
    sol = check(kind, *make_layer(kind, SOLVERS[solver_name]))
    assert np.all(sol.result == optx.RESULTS.successful)
    for leaf in jtu.tree_leaves(sol.residual):
        assert np.max(np.abs(leaf)) <= TOL


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled(kind):
    layer, xs = make_layer(kind, SOLVERS["newton"])
    sol = check(kind, inn.set_fixed_depth(layer, 10), xs)
    assert np.all(sol.stats["nfe"] == 10)
