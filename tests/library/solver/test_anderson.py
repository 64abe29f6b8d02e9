import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn
from implicitnets._solver.anderson import solve_gram

from ..helpers import (
    linear_map,
    make_matrix,
    make_vector,
    pair_cell,
    problem,
    relative_error,
    relative_residual,
    solve,
    tolerance,
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("period", (1, 3))
@pytest.mark.parametrize("history_size, most", ((5, 65), (10, 40)))
def test_linear_map_needs_few_evaluations(history_size, most, period, seed):
    """Plain iteration needs about 200 to 280 here."""
    args = make_matrix(50, 0.95, seed, symmetric=True), make_vector(50)
    solver = inn.AndersonAcceleration(
        1e-6, 0.0, history_size=history_size, period=period
    )
    sol = solve(linear_map, solver, jnp.zeros(50), args)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["nfe"] == sol.stats["num_steps"] <= most
    assert relative_residual(linear_map, sol.value, args) <= 1.05e-6


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("history_size", (3, 5, 10))
def test_history_overflow_converges(history_size, symmetric):
    radius = 0.95 if symmetric else 0.99
    args = make_matrix(50, radius, symmetric=symmetric), make_vector(50)
    solver = inn.AndersonAcceleration(1e-5, 0.0, history_size=history_size)
    sol = solve(linear_map, solver, jnp.zeros(50), args)
    assert sol.result == optx.RESULTS.successful


def test_iterations_do_not_depend_on_the_scale():
    matrix, vector = make_matrix(20, 0.9, symmetric=True), make_vector(20)

    @jax.jit
    def num_steps(scale):
        def fn(z, _):
            return scale * (matrix @ (z / scale) + vector)

        solver = inn.AndersonAcceleration(1e-5, 0.0)
        return solve(fn, solver, jnp.zeros(20)).stats["num_steps"]

    steps = [int(num_steps(jnp.array(10.0**p))) for p in (-6, -3, 0, 3, 6)]
    assert max(steps) - min(steps) <= 1


def test_accelerates_from_the_second_step_on():
    """In one dimension two evaluations give the root of a linear map exactly."""
    sol = solve(
        lambda z, _: -3 * z + 1, inn.AndersonAcceleration(1e-5, 0.0), jnp.zeros(1)
    )
    assert sol.stats["nfe"] == 3
    assert np.allclose(sol.value, 0.25, rtol=1e-5)


def test_steps_of_the_plain_iteration_lie_between_accelerations():
    args = make_matrix(8, 0.9), make_vector(8)
    solver = inn.AndersonAcceleration(0.0, 0.0, history_size=2, warmup=0)
    fn = ft.partial(solver.step, lambda z, args: (linear_map(z, args), None))
    z, accelerated = jnp.zeros(8), []
    state = solver.init(lambda z, args: (z, None), z, args, {}, z, None, frozenset())
    for _ in range(6):
        new_z, state, _ = fn(z, args, {}, state, frozenset())
        accelerated.append(relative_error(new_z, linear_map(z, args)) > 1e-4)
        z = new_z
    assert accelerated == [False, True, False, False, True, False]


def test_history_of_one_beats_plain_iteration():
    args = make_matrix(20, 0.9, symmetric=True), make_vector(20)
    anderson = solve(
        linear_map,
        inn.AndersonAcceleration(1e-5, 0.0, history_size=1),
        jnp.zeros(20),
        args,
    )
    z, plain = jnp.zeros(20), 0
    while relative_residual(linear_map, z, args) > 1e-5:
        z, plain = linear_map(z, args), plain + 1
    assert anderson.stats["nfe"] < plain


@pytest.mark.parametrize("damping", (-1.0, -0.5, 0.3))
def test_damping(damping):
    args = make_matrix(20, 0.5), make_vector(20)
    solver = inn.AndersonAcceleration(1e-5, 0.0, damping=damping)
    sol = solve(linear_map, solver, jnp.zeros(20), args)
    assert sol.result == optx.RESULTS.successful
    # The first step has no history yet: it is the damped plain one.
    z0 = jnp.zeros(20)
    state = solver.init(linear_map, z0, args, {}, z0, None, frozenset())
    first, *_ = solver.step(
        lambda z, args: (linear_map(z, args), None),
        jnp.zeros(20),
        args,
        {},
        state,
        frozenset(),
    )
    assert relative_error(first, (1 - damping) * np.asarray(args[1])) < 1e-6
    exact = np.linalg.solve(np.eye(20) - np.asarray(args[0]), np.asarray(args[1]))
    assert relative_error(sol.value, exact) < 1e-3


def test_returns_the_best_answer_that_the_evaluations_allow():
    solver, z = inn.AndersonAcceleration(0.0, 1e-9), jnp.ones(2)

    def fn(z, _):
        return jnp.stack([3 * z[1] ** 2 + 1.5, jnp.cos(4 * z[0]) - z[1]])

    def with_aux(z, args):
        return fn(z, args), None

    state = solver.init(with_aux, z, None, {}, z, None, frozenset())
    evaluated, went_on = [], set()
    for max_steps in range(1, 8):
        evaluated.append((float(jnp.linalg.norm(fn(z, None) - z)), z))
        z, state, _ = solver.step(with_aux, z, None, {}, state, frozenset())
        best = min(evaluated, key=lambda pair: pair[0])
        went_on.add(on_course := evaluated[-1][0] <= 2 * best[0])
        sol = solve(fn, solver, jnp.ones(2), max_steps=jnp.array(max_steps))
        assert relative_error(sol.value, z if on_course else best[1]) < 1e-4
    assert went_on == {True, False}


def test_exact_convergence_and_constant_map():
    sol = solve(
        lambda z, _: jnp.ones(3), inn.AndersonAcceleration(0.0, 0.0), jnp.zeros(3)
    )
    assert sol.result == optx.RESULTS.successful
    assert np.array_equal(sol.value, np.ones(3))


def test_stagnating_iteration_stays_finite():
    """No tolerance, so that it goes on far below rounding."""
    args = make_matrix(8, 0.5), make_vector(8)
    sol = solve(
        linear_map,
        inn.AndersonAcceleration(0.0, 0.0),
        jnp.zeros(8),
        args,
        max_steps=200,
    )
    assert relative_residual(linear_map, sol.value, args) < tolerance(1e-6, 1e-14)


def test_divergence():
    sol = solve(
        lambda z, _: z**2 + 1.0, inn.AndersonAcceleration(1e-6, 0.0), jnp.zeros(2)
    )
    assert sol.result == optx.RESULTS.nonlinear_divergence
    assert jnp.all(jnp.isfinite(sol.value))


def test_overflow():
    sol = solve(
        lambda z, _: jnp.exp(z) + 1.0, inn.AndersonAcceleration(1e-6, 0.0), jnp.zeros(2)
    )
    # Which is seen first depends on how the evaluations are rounded.
    assert sol.result in (
        optx.RESULTS.nonlinear_divergence,
        optx.RESULTS.nonfinite,
    )
    assert jnp.all(jnp.isfinite(sol.value))


def test_multi_leaf_state_is_one_vector():
    cell, x = problem("pair")
    assert isinstance(cell, type(pair_cell()))
    z0 = jax.tree.map(jnp.zeros_like, x)
    pair = solve(cell, inn.AndersonAcceleration(1e-5, 0.0), z0, x)
    flat_x, unravel = ravel_pytree(x)

    def flat_cell(z, x):
        return ravel_pytree(cell(unravel(z), unravel(x)))[0]

    flat = solve(flat_cell, inn.AndersonAcceleration(1e-5, 0.0), 0 * flat_x, flat_x)
    assert pair.stats["num_steps"] == flat.stats["num_steps"]
    assert relative_error(pair.value, unravel(flat.value)) < 1e-4


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32))
def test_narrow_states(dtype):
    """Float32 also where float64 is on."""
    matrix = make_matrix(8, 0.5).astype(dtype)
    vector = make_vector(8).astype(dtype)
    tol = 20 * float(jnp.finfo(dtype).eps)

    def fn(z, _):
        return jnp.tanh(matrix @ z + vector)

    sol = solve(fn, inn.AndersonAcceleration(tol, 0.0), jnp.zeros(8, dtype))
    assert sol.value.dtype == dtype
    assert sol.result == optx.RESULTS.successful
    assert relative_residual(fn, sol.value, None) <= 2 * tol


@pytest.mark.parametrize("adjoint", (optx.ImplicitAdjoint(), inn.ImplicitAdjoint()))
def test_batch_is_as_alone_under_every_loop(adjoint):
    matrix = make_matrix(8, 0.8)
    vectors = jnp.stack([make_vector(8, seed=s) * 10.0 ** (s - 2) for s in range(4)])

    def run(vector):
        def fn(z, _):
            return jnp.tanh(matrix @ z + vector)

        sol = optx.fixed_point(
            fn,
            inn.AndersonAcceleration(1e-4, 0.0),
            jnp.zeros(8),
            adjoint=adjoint,
            throw=False,
        )
        return sol.value, sol.stats["nfe"]

    values, nfe = jax.jit(jax.vmap(run))(vectors)
    assert len(set(nfe.tolist())) > 1
    for i, vector in enumerate(vectors):
        value, steps = jax.jit(run)(vector)
        assert steps == nfe[i]
        assert relative_error(values[i], value) < 1e-4


def test_singular_systems_give_no_nan():
    matrix = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    x = solve_gram(matrix, jnp.array([2.0, 2.0, 0.0]), jnp.asarray(1e-7, matrix.dtype))
    assert np.allclose(matrix @ x, jnp.array([2.0, 2.0, 0.0]), atol=1e-3)
    assert x[2] == 0
    assert jnp.all(solve_gram(0 * matrix, jnp.zeros(3), jnp.zeros(())) == 0)


def test_small_systems_agree_with_lapack():
    factor = make_matrix(5, 1.0)
    matrix, vector = factor @ factor.T, make_vector(5)
    x = solve_gram(matrix, vector, jnp.zeros((), matrix.dtype))
    assert relative_error(x, np.linalg.solve(matrix, vector)) < tolerance(1e-2, 1e-9)


def test_filter_jit_takes_the_solver_as_an_argument():
    run = eqx.filter_jit(
        lambda s: solve(lambda z, _: 0.5 * z + 1, s, jnp.zeros(2)).value
    )
    assert np.allclose(run(inn.AndersonAcceleration(1e-5, 1e-5)), 2.0)
