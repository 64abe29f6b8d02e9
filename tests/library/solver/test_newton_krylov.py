import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn
from implicitnets import NewtonKrylov

from ..helpers import (
    dense_cell,
    linear_map,
    make_matrix,
    make_vector,
    pair_cell,
    problem,
    relative_error,
    relative_residual,
    solve as solve_within,
    tolerance,
)


solve = ft.partial(solve_within, max_steps=100)


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def arctan_cell(z, args):
    """Newton's method overshoots by more and more from far away."""
    matrix, vector = args
    return z - jnp.arctan(z - matrix @ jnp.tanh(z) - vector)


@pytest.mark.parametrize("name", ("dense", "conv", "pair"))
def test_stopping_rule(name):
    cell, x = problem(name)
    rtol = tolerance(1e-5, 1e-10)
    sol = solve(cell, NewtonKrylov(rtol, 0.0), zeros_like(x), x)
    assert sol.result == optx.RESULTS.successful
    assert relative_residual(cell, sol.value, x) <= 1.01 * rtol
    assert sol.stats["nfe"] == sol.stats["num_steps"] <= 8


def test_absolute_tolerance():
    cell, x = problem("dense")
    sol = solve(cell, NewtonKrylov(0.0, 1e-4), zeros_like(x), x)
    assert sol.result == optx.RESULTS.successful
    assert jnp.linalg.norm(cell(sol.value, x) - sol.value) <= 1e-4
    # The start is good enough.
    sol = solve(cell, NewtonKrylov(0.0, 1e3), zeros_like(x), x)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_steps"] == 1
    assert sol.stats["num_matvecs"] == 0
    assert np.array_equal(sol.value, np.zeros(4))


def test_targets_of_deq_jax():
    """Maps that expand, with spectral radius 2 and 3."""
    rtol = tolerance(1e-6, 1e-12)
    scalar = solve(
        lambda z, _: -2 * z + 1, NewtonKrylov(rtol, 0.0), jnp.zeros((1, 2, 3))
    )
    assert np.allclose(jnp.sum(scalar.value), 2, rtol=10 * rtol)
    dense = solve(
        lambda z, _: z @ jnp.ones((3, 3)) + 1,
        NewtonKrylov(rtol, 0.0),
        jnp.zeros((1, 2, 3)),
    )
    assert np.allclose(jnp.sum(dense.value), -3, rtol=10 * rtol)
    for sol in (scalar, dense):
        assert sol.result == optx.RESULTS.successful
        assert sol.stats["num_steps"] == 2
        assert sol.stats["num_matvecs"] == 1


@pytest.mark.parametrize("spectral_radius", (0.95, 1.2))
def test_linear_map(spectral_radius):
    args = make_matrix(50, spectral_radius, symmetric=True), make_vector(50)
    sol = solve(linear_map, NewtonKrylov(1e-5, 0.0), jnp.zeros(50), args)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_matvecs"] + sol.stats["nfe"] <= 100
    exact = np.linalg.solve(np.eye(50) - np.asarray(args[0]), np.asarray(args[1]))
    assert relative_error(sol.value, exact) < 1e-2


@pytest.mark.parametrize("start", (10.0, -30.0))
def test_poor_start_where_newton_fails(start):
    def root_find(solver):
        return optx.root_find(
            lambda z, _: jnp.arctan(z), solver, jnp.array(start), throw=False
        )

    atol = tolerance(1e-5, 1e-10)
    newton = root_find(optx.Newton(0.0, atol))
    assert not abs(newton.value) < abs(start)
    sol = root_find(NewtonKrylov(0.0, atol))
    assert sol.result == optx.RESULTS.successful
    assert abs(sol.value) <= 1.01 * atol
    assert sol.stats["num_rejected_steps"] >= 1
    # Newton's method ends with quadratic convergence.
    assert sol.stats["num_steps"] <= 25


def test_poor_start_of_a_system():
    args = make_matrix(6, 0.5), make_vector(6)
    newton = solve(arctan_cell, optx.Newton(0.0, 1e-5), jnp.full(6, 20.0), args)
    assert newton.result != optx.RESULTS.successful
    sol = solve(arctan_cell, NewtonKrylov(0.0, 1e-5), jnp.full(6, 20.0), args)
    assert sol.result == optx.RESULTS.successful
    assert jnp.linalg.norm(arctan_cell(sol.value, args) - sol.value) <= 1e-5


def test_counts_what_it_evaluates():
    evaluations = []

    def cell(z, args):
        jax.debug.callback(lambda: evaluations.append(None))
        return jnp.tanh(linear_map(z, args))

    args = make_matrix(8, 0.9), make_vector(8)
    sol = solve(cell, NewtonKrylov(1e-4, 0.0), jnp.zeros(8), args)
    jax.block_until_ready(sol.value)
    jax.effects_barrier()
    assert len(evaluations) == sol.stats["nfe"]


def test_returns_the_best_iterate_evaluated():
    args = make_matrix(6, 0.5), make_vector(6)

    def residual(max_steps):
        solver, z0 = NewtonKrylov(0.0, 1e-9), jnp.full(6, 20.0)
        sol = solve(arctan_cell, solver, z0, args, max_steps=max_steps)
        assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
        return float(jnp.linalg.norm(arctan_cell(sol.value, args) - sol.value))

    residuals = [residual(max_steps) for max_steps in (1, 3, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.95 * residuals[0]


def test_nonfinite():
    nowhere = solve(
        lambda z, _: jnp.full_like(z, jnp.nan), NewtonKrylov(1e-3, 1e-3), jnp.ones(3)
    )
    assert nowhere.result == optx.RESULTS.nonfinite
    assert nowhere.stats["num_steps"] == 1
    assert np.array_equal(nowhere.value, np.ones(3))
    # Finite at the start only.
    start = jnp.ones(3)
    sol = solve(
        lambda z, _: jnp.where(z == start, 2 * z, jnp.nan),
        NewtonKrylov(1e-3, 1e-3),
        start,
    )
    assert sol.result == optx.RESULTS.nonfinite
    assert np.array_equal(sol.value, start)
    # In the last step.
    sol = solve(lambda z, _: z / 0, NewtonKrylov(1e-3, 1e-3), jnp.zeros(3), max_steps=1)
    assert sol.result == optx.RESULTS.nonfinite


def test_steps_back_from_where_the_map_is_not_defined():
    """A full Newton step from 20 leads to a negative number."""
    sol = optx.root_find(
        lambda z, _: jnp.log(z), NewtonKrylov(0.0, 1e-4), jnp.array(20.0), throw=False
    )
    assert sol.result == optx.RESULTS.successful
    assert np.allclose(sol.value, 1, rtol=1e-3)


def test_singular_jacobian():
    sol = solve(lambda z, _: z + 1, NewtonKrylov(1e-4, 0.0), jnp.zeros(3))
    assert sol.result == optx.RESULTS.breakdown
    assert sol.stats["num_steps"] == 1
    assert np.array_equal(sol.value, np.zeros(3))


def test_no_decrease_any_more_ends_the_solve():
    """No tolerance, and no number whose square is two."""
    sol = optx.root_find(
        lambda z, _: z * z - 2, NewtonKrylov(0.0, 0.0), jnp.array(1.0), throw=False
    )
    assert sol.result == optx.RESULTS.stagnation
    assert sol.stats["num_rejected_steps"] < sol.stats["num_steps"] < 100
    assert np.allclose(sol.value, np.sqrt(2), rtol=tolerance(3e-7, 1e-15))


def test_forcing_spares_products():
    """Accurate linear solves far from the root are wasted."""
    cell, x = dense_cell(40, 0.9), make_vector(40)
    inexact = solve(cell, NewtonKrylov(1e-5, 0.0), jnp.zeros(40), x)
    exact = solve(cell, NewtonKrylov(1e-5, 0.0, forcing=1e-5), jnp.zeros(40), x)
    for sol in (inexact, exact):
        assert sol.result == optx.RESULTS.successful
    assert int(inexact.stats["num_matvecs"]) < 0.7 * int(exact.stats["num_matvecs"])


@pytest.mark.parametrize(
    "linear_solver", (lx.GMRES(1e-6, 0.0, restart=2), inn.GivensGMRES(1e-6, 0.0))
)
def test_forces_any_linear_solver_that_has_a_tolerance(linear_solver):
    """By its own tolerance it would solve the linear problem in one step."""
    args = make_matrix(20, 0.9, symmetric=True), make_vector(20)
    num_steps = []
    for forcing in (0.5, 1e-6):
        solver = NewtonKrylov(1e-4, 0.0, linear_solver=linear_solver, forcing=forcing)
        sol = solve(linear_map, solver, jnp.zeros(20), args)
        assert sol.result == optx.RESULTS.successful
        num_steps.append(int(sol.stats["num_steps"]))
    assert num_steps[0] > num_steps[1] == 2


def test_vmap_is_alone():
    matrix = make_matrix(10, 0.95)
    # From one that is solved at once to one that takes many shortened steps, and one
    # that fails.
    starts = jnp.stack([jnp.full(10, s) for s in (0.0, 0.5, 5.0, 20.0, jnp.nan)])
    vectors = jnp.stack(
        [1e-6 * make_vector(10), *[make_vector(10, i) for i in range(4)]]
    )

    @jax.jit
    def run(start, vector):
        args = 0.5 * matrix, vector
        solver = NewtonKrylov(0.0, tolerance(1e-4, 1e-8))
        sol = solve(arctan_cell, solver, start, args)
        stats = {k: sol.stats[k] for k in ("num_steps", "nfe", "num_matvecs")}
        return sol.value, stats, sol.result

    values, stats, results = jax.vmap(run)(starts, vectors)
    assert len(set(stats["num_steps"].tolist())) >= 4
    for i, (start, vector) in enumerate(zip(starts, vectors, strict=True)):
        value, stat, result = run(start, vector)
        assert result._value == results._value[i]
        assert {k: int(v) for k, v in stat.items()} == {
            k: int(v[i]) for k, v in stats.items()
        }
        assert np.allclose(value, values[i], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_leaves_are_one_vector():
    cell, x = pair_cell(), problem("pair")[1]
    flat_x, unravel = ravel_pytree(x)

    def flat_cell(z, x):
        return ravel_pytree(cell(unravel(z), unravel(x)))[0]

    solver = NewtonKrylov(1e-5, 0.0)
    tree = solve(cell, solver, zeros_like(x), x)
    flat = solve(flat_cell, solver, jnp.zeros(6), flat_x)
    assert relative_error(tree.value, unravel(flat.value)) < 1e-5
    assert tree.stats["num_matvecs"] == flat.stats["num_matvecs"]


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.float32))
def test_dtypes(dtype):
    matrix = make_matrix(8, 0.6).astype(dtype)
    vector = make_vector(8).astype(dtype)

    def fn(z, _):
        return jnp.tanh(matrix @ z + vector)

    sol = solve(fn, NewtonKrylov(2e-2, 0.0), jnp.zeros(8, dtype))
    assert sol.value.dtype == dtype
    assert sol.result == optx.RESULTS.successful


def test_traced_hyperparameters_do_not_recompile():
    cell, x = problem("dense")
    num_traces = 0

    @eqx.filter_jit
    def run(solver):
        nonlocal num_traces
        num_traces += 1
        return solve(cell, solver, zeros_like(x), x).stats["num_steps"]

    loose = run(NewtonKrylov(jnp.array(1e-1), jnp.array(0.0), forcing=jnp.array(0.5)))
    tight = run(NewtonKrylov(jnp.array(1e-5), jnp.array(0.0), forcing=jnp.array(0.1)))
    assert loose < tight
    assert num_traces == 1


@pytest.mark.parametrize(
    "linear_solver",
    (
        lx.AutoLinearSolver(well_posed=None),
        lx.GMRES(1e-3, 1e-3),
        inn.GivensGMRES(0.5, 0.0, restart=2),
        inn.NeumannSeries(10),
    ),
)
def test_any_linear_solver(linear_solver):
    cell, x = problem("dense")
    solver = NewtonKrylov(1e-5, 0.0, linear_solver=linear_solver)
    sol = solve(cell, solver, zeros_like(x), x)
    assert sol.result == optx.RESULTS.successful
    tells = isinstance(linear_solver, inn.GivensGMRES | inn.NeumannSeries)
    assert ("num_matvecs" in sol.stats) == tells


@pytest.mark.parametrize(
    "adjoint", (optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint())
)
def test_stock_adjoints(adjoint):
    cell, x = problem("dense")
    solver = NewtonKrylov(tolerance(1e-6, 1e-10), 0.0)

    def total(x, adjoint):
        sol = optx.fixed_point(
            cell, solver, zeros_like(x), x, adjoint=adjoint, throw=False, max_steps=20
        )
        return jnp.sum(sol.value)

    ours = jax.grad(total)(x, inn.ImplicitAdjoint())
    assert relative_error(jax.grad(total)(x, adjoint), ours) < 1e-3


def test_errors():
    with pytest.raises(ValueError, match="structure"):
        optx.root_find(lambda z, _: z[:2], NewtonKrylov(1e-3, 0.0), jnp.ones(3))
