"""Every kind of solver, start, penalty and cell, as in the test matrix of SciML's
DeepEquilibriumNetworks.jl, whose tolerances these are."""

import functools as ft
import itertools
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
from implicitnets import (
    MultiScaleDeepEquilibriumNetwork,
    SkipMultiScaleDeepEquilibriumNetwork,
)
from implicitnets._regularise import jacobian_penalty

from .helpers import multiscale_layers, SumCell


# Theirs are in single precision, and a tolerance of 1e-3 asks for no more.
pytestmark = pytest.mark.one_precision

TOL = 1e-3

SOLVERS = {
    "vcabm3": inn.SteadyState(inn.VCABM3(), rtol=0.0, atol=TOL),
    "tsit5": inn.SteadyState(dfx.Tsit5(), rtol=0.0, atol=TOL),
    "newton": optx.Newton(TOL, TOL),
    "broyden": inn.Broyden(rtol=0.0, atol=TOL),
}
KINDS = ("plain", "skip", "skipreg")
PENALTIES = ("without_penalty", "with_penalty")
CELLS = ("dense", "conv", "multiscale")
CASES = tuple(itertools.product(KINDS, PENALTIES))


def scaled(tree: tuple | eqx.Module) -> Any:
    return jtu.tree_map(lambda x: 0.3 * x if eqx.is_array(x) else x, tree)


def make_layers(cell_name, solver):
    """A layer of every kind, and a batch of three inputs for every case."""
    key, init_key, x_key = jr.split(jr.key(0), 3)
    if cell_name == "multiscale":
        sizes = (4, 3, 2, 1)
        main, mapping, post_fuse = scaled(multiscale_layers(sizes, key=key))
        init = [eqx.nn.Linear(4, size, key=init_key) for size in sizes]
        shapes = [(size,) for size in sizes]
        plain, skip = (
            ft.partial(kind, main, mapping, post_fuse, solver, state_shapes=shapes)
            for kind in (
                MultiScaleDeepEquilibriumNetwork,
                SkipMultiScaleDeepEquilibriumNetwork,
            )
        )
        return (plain(), skip(init=init), skip()), jr.normal(x_key, (6, 3, 4))
    if cell_name == "dense":
        make, x = ft.partial(eqx.nn.Linear, 2, 2), jr.normal(x_key, (6, 3, 2))
    else:
        make, x = ft.partial(eqx.nn.Conv2d, 3, 3, 1), jr.normal(x_key, (6, 3, 3, 3, 3))
    cell = scaled(SumCell(*(make(key=k) for k in jr.split(key))))
    plain = inn.DeepEquilibriumNetwork(cell, solver)
    skip = ft.partial(inn.SkipDeepEquilibriumNetwork, cell, solver)
    return (plain, skip(init=make(key=init_key)), skip()), x


@ft.cache
def run(solver_name, cell_name, fixed_depth=0):
    """Solutions and gradients of all cases, in one compilation."""
    layers, xs = make_layers(cell_name, SOLVERS[solver_name])
    layers = inn.set_fixed_depth(layers, fixed_depth)

    def loss(params, kind, weight):
        layers, x = params
        starts = [layer.start(x) for layer in layers]
        z0 = jtu.tree_map(lambda *leaves: jnp.stack(leaves)[kind], *starts)
        deq = layers[0]
        sol = deq.solve(x, z0=z0)
        penalty = jacobian_penalty(deq.cell, sol.z_star, x, key=jr.key(1))
        squares = optx.two_norm(sol.z_star) ** 2
        return squares + weight * penalty + inn.skip_penalty(sol), sol

    def run_case(x, kind, weight):
        gradient = eqx.filter_value_and_grad(loss, has_aux=True)
        (_, sol), gradients = gradient((layers, x), kind, weight)
        return sol, gradients

    kinds = jnp.array([KINDS.index(kind) for kind, _ in CASES])
    weights = jnp.array([PENALTIES.index(penalty) for _, penalty in CASES], xs.dtype)
    run_cases = jax.vmap(jax.vmap(run_case, in_axes=(0, None, None)))
    return jax.jit(run_cases)(xs, kinds, weights)


def check(out, kind, penalty):
    """What holds in every case; returns the solution."""
    index = CASES.index((kind, penalty))
    sol, (layers, x) = jtu.tree_map(lambda leaf: np.asarray(leaf[index]), out)
    for leaf in jtu.tree_leaves((sol, layers, x)):
        assert np.all(np.isfinite(leaf))
    assert np.any(x != 0)
    init_gradient = jtu.tree_leaves(layers[1].init)
    assert any(np.any(leaf != 0) for leaf in init_gradient) == (kind == "skip")
    return sol


@pytest.mark.parametrize("cell_name", CELLS)
@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("kind, penalty", CASES)
def test_solve(kind, penalty, solver_name, cell_name):
    sol = check(run(solver_name, cell_name), kind, penalty)
    assert np.all(sol.result == optx.RESULTS.successful)
    for leaf in jtu.tree_leaves(sol.residual):
        assert np.max(np.abs(leaf)) <= TOL


@pytest.mark.parametrize("cell_name", CELLS)
@pytest.mark.parametrize("kind, penalty", CASES)
def test_unrolled(kind, penalty, cell_name):
    sol = check(run("newton", cell_name, fixed_depth=10), kind, penalty)
    assert np.all(sol.stats["nfe"] == 10)
