"""Every kind of solver, layer, penalty and cell, as in the test matrix of SciML's
DeepEquilibriumNetworks.jl, whose tolerances these are."""

import functools as ft
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

from .helpers import multiscale_layers, SumCell


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
CELLS = ("dense", "conv", "multiscale")


def scaled(tree: tuple | eqx.Module) -> Any:
    return jtu.tree_map(lambda x: 0.3 * x if eqx.is_array(x) else x, tree)


def make_layer(kind, cell_name, solver):
    """A layer, and a batch of inputs."""
    key, init_key, x_key = jr.split(jr.key(0), 3)
    if cell_name == "multiscale":
        sizes = (4, 3)
        parts = scaled(multiscale_layers(sizes, key=key))
        init = [eqx.nn.Linear(4, size, key=init_key) for size in sizes]
        shapes = [(size,) for size in sizes]
        plain, skip = (
            ft.partial(kind, *parts, solver, state_shapes=shapes)
            for kind in (
                inn.MultiScaleDeepEquilibriumNetwork,
                inn.SkipMultiScaleDeepEquilibriumNetwork,
            )
        )
        xs = jr.normal(x_key, (3, 4))
    else:
        make, shape = {
            "dense": (ft.partial(eqx.nn.Linear, 2, 2), (3, 2)),
            "conv": (ft.partial(eqx.nn.Conv2d, 3, 3, 1), (3, 3, 3, 3)),
        }[cell_name]
        cell = scaled(SumCell(*(make(key=k) for k in jr.split(key))))
        init, xs = make(key=init_key), jr.normal(x_key, shape)
        plain = ft.partial(inn.DeepEquilibriumNetwork, cell, solver)
        skip = ft.partial(inn.SkipDeepEquilibriumNetwork, cell, solver)
    match kind:
        case "plain":
            return plain(), xs
        case "skip":
            return skip(init=init), xs
        case _:
            return skip(), xs


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

    weights = jnp.arange(2, dtype=xs.dtype)
    return jax.vmap(jax.vmap(of_example, (None, 0)), (0, None))(weights, xs)


def check(kind, layer, xs):
    """What holds in every case; returns the solutions."""
    sol, (layer, x) = run(layer, xs)
    for leaf in jtu.tree_leaves((sol, layer, x)):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.any(x != 0, axis=tuple(range(2, x.ndim))))
    without, with_penalty = (jtu.tree_map(lambda g: g[i], layer.cell) for i in range(2))
    assert not eqx.tree_equal(without, with_penalty, rtol=1e-3, atol=1e-6)
    if kind == "skip":
        assert all(np.any(leaf != 0) for leaf in jtu.tree_leaves(layer.init))
    return sol


@pytest.mark.parametrize("cell_name", CELLS)
@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_solve(kind, solver_name, cell_name):
    sol = check(kind, *make_layer(kind, cell_name, SOLVERS[solver_name]))
    assert np.all(sol.result == optx.RESULTS.successful)
    for leaf in jtu.tree_leaves(sol.residual):
        assert np.max(np.abs(leaf)) <= TOL
    assert any(np.any(leaf != 0) for leaf in jtu.tree_leaves(sol.z0)) == (
        kind != "plain"
    )


@pytest.mark.parametrize("cell_name", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_unrolled(kind, cell_name):
    layer, xs = make_layer(kind, cell_name, SOLVERS["newton"])
    sol = check(kind, inn.set_fixed_depth(layer, 10), xs)
    assert np.all(sol.stats["nfe"] == 10)
