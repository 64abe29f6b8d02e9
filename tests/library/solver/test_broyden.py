import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn
from implicitnets import Broyden

from ..helpers import (
    linear_map,
    make_matrix,
    make_vector,
    problem,
    relative_error,
    relative_residual,
    solve,
    tolerance,
)


@eqx.filter_jit
def trajectory(fn, solver, z, args, *, num_steps):
    """The iterates, and the best of them up to and with each one."""

    def root_fn(z, args):
        return fn(z, args) - z, None

    def step(carry, _):
        z, state = carry
        new_z, state, _ = solver.step(root_fn, z, args, {}, state, frozenset())
        return (new_z, state), (z, state.kept.progress.best_y)

    struct = jax.eval_shape(lambda: z)
    state = solver.init(root_fn, z, args, {}, struct, None, frozenset())
    return jax.lax.scan(step, (z, state), length=num_steps)[1]


def uniform_spectrum(spectral_radius, seed):
    """A symmetric matrix of evenly spaced eigenvalues."""
    factor, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(50, 50)))
    eigenvalues = np.linspace(-spectral_radius, spectral_radius, 50)
    return jnp.asarray((factor * eigenvalues) @ factor.T, jnp.result_type(float))


def repelling_map(z, args):
    """Contracts but for one direction, which it flips and stretches."""
    matrix, direction, vector = args
    return jnp.tanh(matrix @ z - 4 * direction * jnp.sum(direction * z) + vector)


def repelling_args(size):
    direction = make_vector(size, seed=3)
    direction = direction / jnp.linalg.norm(direction)
    return make_matrix(size, 0.6), direction, 0.3 * make_vector(size)


def cubic_map(z, args):
    matrix, vector = args
    return -0.3 * z**3 - 0.5 * (matrix @ z) - vector


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("history_size, most", ((3, 60), (5, 45), (10, 40)))
def test_linear_map_needs_few_evaluations(history_size, most, seed):
    """Plain iteration needs about 200 here."""
    args = make_matrix(50, 0.95, seed, symmetric=True), make_vector(50)
    solver = Broyden(1e-6, 0.0, history_size=history_size)
    sol = solve(linear_map, solver, jnp.zeros(50), args)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["nfe"] == sol.stats["num_steps"] <= most
    assert relative_residual(linear_map, sol.value, args) <= 1.05e-6


@pytest.mark.parametrize(
    "history_size, good_update",
    ((3, None), (5, None), (10, None), (5, True), (5, False)),
)
def test_history_overflow_converges(history_size, good_update):
    solver = Broyden(1e-6, 0.0, history_size=history_size, good_update=good_update)
    for matrix in (make_matrix(50, 0.99), uniform_spectrum(0.95, 0)):
        sol = solve(linear_map, solver, jnp.zeros(50), (matrix, make_vector(50)))
        assert sol.result == optx.RESULTS.successful


@pytest.mark.parametrize("symmetric", (True, False))
def test_full_memory_converges_on_an_expansive_map(symmetric):
    args = make_matrix(50, 1.2, symmetric=symmetric), make_vector(50)
    solver = Broyden(1e-6, 0.0, history_size=100)
    sol = solve(linear_map, solver, jnp.zeros(50), args, max_steps=100)
    assert sol.result == optx.RESULTS.successful


@pytest.mark.parametrize("good_update", (None, True, False))
def test_is_the_method_of_the_textbook(good_update):
    """The compact representation against explicit updates of a dense matrix."""
    size, history_size, num_steps = 6, 3, 8
    args = repelling_args(size)
    solver = Broyden(
        0.0,
        0.0,
        history_size=history_size,
        good_update=good_update,
        line_search=False,
        warmup=0,
    )

    zs, _ = trajectory(
        repelling_map, solver, jnp.zeros(size), args, num_steps=num_steps
    )

    matrix, direction, vector = (np.asarray(x, float) for x in args)
    z, last_residual = np.zeros(size), np.zeros(size)
    pairs, kinds, expected = [], [], []
    for _ in range(num_steps):
        expected.append(z)
        residual = np.tanh(matrix @ z - 4 * direction * (direction @ z) + vector) - z
        if len(expected) > 1:
            s, y = z - expected[-2], residual - last_residual
            good = good_update
            if good is None:
                good = np.linalg.norm(y) > 2 * np.linalg.norm(s)
            pairs.append((s, y, good))
            kinds.append(bool(good))
        inverse = -np.eye(size)
        for s, y, good in pairs[-history_size:]:
            row = s @ inverse if good else y
            inverse += np.outer(s - inverse @ y, row) / (row @ y)
        z, last_residual = z - inverse @ residual, residual
    if good_update is None:
        assert set(kinds) == {True, False}
    assert relative_error(zs, np.stack(expected)) < tolerance(1e-3, 1e-10)


@pytest.mark.parametrize(
    "fn, total",
    (
        (lambda z, _: -2 * z + 1, 2.0),
        (lambda z, _: jnp.sum(z, axis=-1, keepdims=True) + jnp.ones(z.shape), -3.0),
    ),
)
def test_is_exact_in_one_direction(fn, total):
    """Two evaluations of a linear map give its fixed point, the third confirms it."""
    solver = Broyden(1e-5, 0.0, line_search=False)
    sol = solve(fn, solver, jnp.zeros((1, 2, 3)))
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["nfe"] == 3
    assert np.allclose(jnp.sum(sol.value), total, rtol=1e-4)


def test_exact_convergence_stays_finite():
    constant = solve(lambda z, _: jnp.ones(3), Broyden(0.0, 0.0), jnp.zeros(3))
    assert constant.result == optx.RESULTS.successful
    assert constant.stats["nfe"] == 2
    start = solve(lambda z, _: 0.5 * z, Broyden(1e-3, 1e-3), jnp.zeros(3))
    assert start.result == optx.RESULTS.successful
    assert start.stats["nfe"] == 1


def test_goes_on_below_rounding():
    args = make_matrix(8, 0.5), make_vector(8)
    solver = Broyden(0.0, 0.0, patience=1000)
    sol = solve(linear_map, solver, jnp.zeros(8), args, max_steps=200)
    assert relative_residual(linear_map, sol.value, args) < tolerance(1e-6, 1e-14)


@pytest.mark.parametrize("line_search", (True, False))
def test_nan_is_nonfinite(line_search):
    solver = Broyden(1e-3, 1e-3, line_search=line_search)
    for max_steps in (1, 100):
        sol = solve(lambda z, _: jnp.nan * z, solver, jnp.ones(3), max_steps=max_steps)
        assert sol.result == optx.RESULTS.nonfinite
        assert np.array_equal(sol.value, np.ones(3))
        assert sol.stats["nfe"] == 1


def test_line_search_gets_back_to_where_the_function_is_finite():
    """The first step leads to the logarithm of a negative number."""

    def fn(z, _):
        return z - 10 * jnp.log(z)

    start = 2 * jnp.ones(3)
    sol = solve(fn, Broyden(1e-4, 0.0, line_search=False), start)
    assert sol.result == optx.RESULTS.nonfinite
    assert np.array_equal(sol.value, start)
    sol = solve(fn, Broyden(1e-4, 0.0), start)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_rejected_steps"] >= 1
    assert np.allclose(sol.value, 1.0, rtol=1e-3)


def test_line_search_converges_from_afar():
    args = make_matrix(20, 0.9), make_vector(20)
    start = 3 * make_vector(20, seed=4)
    sol = solve(cubic_map, Broyden(1e-5, 0.0, line_search=False), start, args)
    assert sol.result != optx.RESULTS.successful
    sol = solve(cubic_map, Broyden(1e-5, 0.0), start, args)
    assert sol.result == optx.RESULTS.successful
    assert relative_residual(cubic_map, sol.value, args) <= 1.05e-5


def test_line_search_knows_where_it_came_from():
    """A first step in which the start is lost to rounding, and rejected ten times."""
    huge = 1 / float(jnp.finfo(jnp.result_type(float)).eps)

    def fn(z, _):
        return jnp.where(z < 1, huge, huge * jnp.abs(z))

    solver, start = Broyden(0.0, 1e-3), jnp.full(1, 0.5)
    zs, _ = trajectory(fn, solver, start, None, num_steps=11)
    assert np.allclose(zs[10] - 4.0**-9 * zs[1], start, rtol=1e-2)


def test_line_search_after_a_step_that_overflows():
    """On to where plain iteration leads, since no fraction of the step is finite."""
    big, eps = tolerance(1e15, 1e140), float(jnp.finfo(jnp.result_type(float)).eps)

    def fn(z, _):
        # Nearly level, so that it overflows, with a root where that leads.
        level = jnp.where(z < 0.5 * big, big, (1 + 4 * eps) * big)
        residual = jnp.where(z < 1.5 * big, level, 0)
        return z + jnp.where(z < -big, jnp.nan, residual)

    solver, start = Broyden(0.0, 1e-3, warmup=0), jnp.zeros(1)
    zs, _ = trajectory(fn, solver, start, None, num_steps=3)
    assert zs[2] ** 2 == jnp.inf
    sol = solve(fn, solver, start)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_rejected_steps"] == 1
    assert np.allclose(sol.value, 2 * big, rtol=1e-3)


def test_divergence_and_stagnation():
    args = make_matrix(20, 30.0), make_vector(20)
    solver = Broyden(1e-6, 0.0, history_size=1, line_search=False)
    sol = solve(linear_map, solver, jnp.zeros(20), args)
    assert sol.result == optx.RESULTS.nonlinear_divergence
    assert jnp.all(jnp.isfinite(sol.value))

    sol = solve(lambda z, _: z + 1, Broyden(0.0, 1e-3, patience=7), jnp.zeros(2))
    assert sol.result == optx.RESULTS.stagnation
    assert sol.stats["nfe"] == 8


def test_returns_the_best_answer_that_the_evaluations_allow():
    args, z0, solver = repelling_args(6), jnp.zeros(6), Broyden(0.0, 0.0)
    zs, best = trajectory(repelling_map, solver, z0, args, num_steps=10)
    residuals = [float(jnp.linalg.norm(repelling_map(z, args) - z)) for z in zs]
    assert residuals != sorted(residuals, reverse=True)
    went_on = set()
    for i in range(9):
        least = min(residuals[: i + 1])
        assert np.array_equal(best[i], zs[residuals.index(least)])
        went_on.add(on_course := residuals[i] <= 2 * least)
        sol = solve(repelling_map, solver, z0, args, max_steps=jnp.array(i + 1))
        expected = zs[i + 1] if on_course else best[i]
        assert relative_error(sol.value, expected) < 1e-3
    assert went_on == {True, False}


def test_multi_leaf_state_is_one_vector():
    cell, x = problem("pair")
    z0 = jax.tree.map(jnp.zeros_like, x)
    pair = solve(cell, Broyden(1e-5, 0.0), z0, x)
    flat_x, unravel = ravel_pytree(x)

    def flat_cell(z, x):
        return ravel_pytree(cell(unravel(z), unravel(x)))[0]

    flat = solve(flat_cell, Broyden(1e-5, 0.0), 0 * flat_x, flat_x)
    assert pair.stats["num_steps"] == flat.stats["num_steps"]
    assert relative_error(pair.value, unravel(flat.value)) < 1e-4


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32))
def test_narrow_states(dtype):
    """Float32 also where float64 is on."""
    args = make_matrix(8, 0.5).astype(dtype), make_vector(8).astype(dtype)
    tol = 20 * float(jnp.finfo(dtype).eps)

    def fn(z, args):
        return jnp.tanh(linear_map(z, args))

    sol = solve(fn, Broyden(tol, 0.0), jnp.zeros(8, dtype), args)
    assert sol.value.dtype == dtype
    assert sol.result == optx.RESULTS.successful
    assert relative_residual(fn, sol.value, args) <= 2 * tol


@pytest.mark.parametrize("adjoint", (optx.ImplicitAdjoint(), inn.ImplicitAdjoint()))
def test_batch_is_as_alone_under_every_loop(adjoint):
    """Among partners that need good updates or a line search, or give NaN."""
    matrix, vector = make_matrix(8, 0.6), make_vector(8)

    def fn(z, args):
        slope, cube, shift = args
        return jnp.tanh(matrix @ z) + slope * z - cube * z**3 + shift

    args = (
        jnp.array([0.0, 0.3, -5.0, -0.5, 1.0]),
        jnp.array([0.0, 0.0, 0.0, 0.5, 0.0]),
        jnp.array([0.1, 1.0, 1.0, 8.0, jnp.nan])[:, None] * vector[None, :],
    )

    @jax.jit
    def run(args):
        sol = solve(
            fn,
            Broyden(0.0, 1e-3, patience=40),
            jnp.zeros(8),
            args,
            max_steps=100,
            adjoint=adjoint,
        )
        return sol.value, sol.stats, sol.result == optx.RESULTS.successful

    values, stats, successful = jax.vmap(run)(args)
    assert len(set(stats["nfe"].tolist())) > 2
    assert stats["num_rejected_steps"].any() and not stats["num_rejected_steps"].all()
    assert successful.any() and not successful.all()
    for i in range(5):
        value, alone, success = run(jax.tree.map(lambda x: x[i], args))
        assert success == successful[i]
        if success:
            assert alone["nfe"] == stats["nfe"][i]
            assert alone["num_rejected_steps"] == stats["num_rejected_steps"][i]
            assert relative_error(values[i], value) < 1e-3


def test_derivative_of_the_iteration_itself():
    """Unrolled, so through every guard against a zero denominator."""
    matrix, direction, vector = repelling_args(4)
    solver = Broyden(1e-6, 0.0)

    @jax.grad
    def gradient(vector):
        args = matrix, direction, vector
        adjoint = optx.RecursiveCheckpointAdjoint()
        sol = solve(
            repelling_map, solver, jnp.zeros(4), args, max_steps=16, adjoint=adjoint
        )
        return jnp.sum(sol.value)

    args = matrix, direction, vector
    z = np.asarray(solve(repelling_map, solver, jnp.zeros(4), args).value, float)
    slope = 1 - z**2
    jacobian = slope[:, None] * (matrix - 4 * np.outer(direction, direction))
    expected = slope * np.linalg.solve((np.eye(4) - jacobian).T, np.ones(4))
    assert relative_error(gradient(vector), expected) < 1e-3


def test_traced_tolerances_do_not_recompile():
    num_traces = first_traces = 0

    def fn(z, args):
        nonlocal num_traces
        num_traces += 1
        return linear_map(z, args)

    args = make_matrix(8, 0.9), make_vector(8)
    steps = []
    for tol in (1e-2, 1e-4):
        steps.append(
            solve(fn, Broyden(jnp.array(tol), jnp.array(0.0)), jnp.zeros(8), args).stats
        )
        if len(steps) == 1:
            first_traces = num_traces
    assert num_traces == first_traces
    assert steps[0]["nfe"] < steps[1]["nfe"]


def test_refuses_a_function_of_another_shape():
    with pytest.raises(ValueError, match="structure and shapes"):
        optx.root_find(lambda z, _: z[:1], Broyden(1e-3, 1e-3), jnp.zeros(2))
