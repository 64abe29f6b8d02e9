import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import (
    dense_gradient,
    loss_weights,
    make_matrix,
    make_vector,
    problem,
    relative_error,
    tolerance,
    weighted_sum,
)


RTOL = tolerance(1e-6, 1e-10)

# Anything that finds a fixed point, also by way of a root.
SOLVERS = {
    "plain": optx.FixedPointIteration(RTOL, RTOL),
    "anderson": inn.AndersonAcceleration(RTOL, 0.0),
    "newton": optx.Newton(RTOL, RTOL),
}


def adjoint_matrix(size=10, spectral_radius=0.7):
    return make_matrix(size, spectral_radius) - jnp.eye(size)


@eqx.filter_jit
def linear_solve(matrix, b, solver, options=None):
    structure = jax.eval_shape(lambda: b)
    operator = lx.FunctionLinearOperator(lambda x: matrix @ x, structure)
    return lx.linear_solve(operator, b, solver, options=options, throw=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_solution(name):
    matrix, b = adjoint_matrix(), make_vector(10)
    sol = linear_solve(matrix, b, inn.FixedPointLinearSolver(SOLVERS[name]))
    assert sol.result == lx.RESULTS.successful
    assert relative_error(sol.value, np.linalg.solve(matrix, b)) < 100 * RTOL
    assert sol.stats["num_steps"] < 100


def test_plain_iteration_is_the_neumann_series():
    matrix, b = adjoint_matrix(), make_vector(10)
    solver = inn.FixedPointLinearSolver(optx.FixedPointIteration(0.0, 0.0), max_steps=3)
    sol = linear_solve(matrix, b, solver)
    jacobian = np.asarray(matrix) + np.eye(10)
    series = sum(-np.linalg.matrix_power(jacobian, i) @ np.asarray(b) for i in range(4))
    assert relative_error(sol.value, series) < 100 * RTOL
    assert sol.result == lx.RESULTS.max_steps_reached
    assert sol.stats["num_steps"] == 3


def test_acceleration_reaches_further_than_contractions():
    matrix, b = -2 * jnp.eye(4) - jnp.diag(jnp.arange(4.0)), make_vector(4)
    plain = linear_solve(matrix, b, inn.FixedPointLinearSolver(SOLVERS["plain"]))
    assert plain.result != lx.RESULTS.successful
    anderson = linear_solve(matrix, b, inn.FixedPointLinearSolver(SOLVERS["anderson"]))
    assert anderson.result == lx.RESULTS.successful
    assert relative_error(anderson.value, np.linalg.solve(matrix, b)) < 100 * RTOL


def test_results():
    b = make_vector(4)
    solver = inn.FixedPointLinearSolver(
        inn.AndersonAcceleration(1e-3, 0.0, history_size=1)
    )
    far = jr.normal(jr.key(0), (4, 4)) * 1e6
    assert linear_solve(far, b, solver).result == lx.RESULTS.breakdown
    nan = jnp.full((4, 4), jnp.nan)
    assert linear_solve(nan, b, solver).result == lx.RESULTS.singular
    matrix = adjoint_matrix(4)
    sol = linear_solve(matrix, b.at[0].set(jnp.nan), solver)
    assert sol.result == lx.RESULTS.nonfinite_input


def test_zero_vector():
    sol = linear_solve(
        adjoint_matrix(), jnp.zeros(10), inn.FixedPointLinearSolver(SOLVERS["anderson"])
    )
    assert sol.result == lx.RESULTS.successful
    assert np.array_equal(sol.value, np.zeros(10))


def test_warm_start():
    matrix, b = adjoint_matrix(), make_vector(10)
    solver = inn.FixedPointLinearSolver(SOLVERS["anderson"])
    cold = linear_solve(matrix, b, solver)
    warm = linear_solve(matrix, b, solver, {"y0": cold.value})
    assert warm.stats["nfe"] <= 2 < cold.stats["nfe"]


def test_transpose_and_conj():
    matrix, b = adjoint_matrix(), make_vector(10)
    solver = inn.FixedPointLinearSolver(SOLVERS["anderson"])
    options = {"y0": b}
    state = solver.init(lx.MatrixLinearOperator(matrix), options)
    state, options = solver.transpose(*solver.conj(state, options))
    assert options == {}
    value, result, _ = eqx.filter_jit(solver.compute)(state, b, options)
    assert result == lx.RESULTS.successful
    assert relative_error(value, np.linalg.solve(matrix.T, b)) < 100 * RTOL


def test_vmap_is_alone():
    matrices = jnp.stack([adjoint_matrix(6, radius) for radius in (0.1, 0.6, 0.95)])
    bs = jnp.stack([make_vector(6, seed) for seed in range(3)])
    solver = inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-4, 0.0))

    @jax.jit
    def run(matrix, b):
        sol = linear_solve(matrix, b, solver)
        return sol.value, sol.stats["num_steps"]

    values, num_steps = jax.vmap(run)(matrices, bs)
    assert len(set(num_steps.tolist())) >= 2
    for i in range(3):
        value, steps = run(matrices[i], bs[i])
        assert steps == num_steps[i]
        assert relative_error(values[i], value) < 1e-4


@pytest.mark.parametrize("name", ("plain", "anderson"))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_dtypes(name, dtype):
    """`optx.FixedPointIteration` alone takes neither of the two under x64."""
    matrix, b = adjoint_matrix().astype(dtype), make_vector(10).astype(dtype)
    solver = {
        "plain": optx.FixedPointIteration(1e-2, 1e-2),
        "anderson": inn.AndersonAcceleration(1e-2, 0.0),
    }[name]
    sol = linear_solve(matrix, b, inn.FixedPointLinearSolver(solver))
    assert sol.value.dtype == dtype
    assert sol.result == lx.RESULTS.successful


@pytest.mark.parametrize("name", ("plain", "anderson"))
@pytest.mark.parametrize("cell_name", ("dense", "conv", "pair"))
def test_gradient(name, cell_name):
    cell, x = problem(cell_name)
    weights = loss_weights(x)
    adjoint = inn.ImplicitAdjoint(inn.FixedPointLinearSolver(SOLVERS[name]))
    solver = inn.AndersonAcceleration(RTOL, 0.0)

    @jax.jit
    @ft.partial(jax.grad, has_aux=True)
    def grad_and_root(x):
        z0 = jtu.tree_map(jnp.zeros_like, x)
        z = optx.fixed_point(cell, solver, z0, x, adjoint=adjoint, throw=False).value
        return weighted_sum(z, weights), z

    program = grad_and_root.lower(x)
    grad, root = program.compile()(x)
    _, truth = dense_gradient(cell, root, x, weights)
    assert relative_error(grad, truth) < 1e4 * RTOL
    assert "custom_call" not in program.as_text()


def test_forward_mode_and_second_order():
    cell, x = problem("dense")
    adjoint = inn.ImplicitAdjoint(inn.FixedPointLinearSolver(SOLVERS["anderson"]))
    exact = inn.ImplicitAdjoint(lx.LU())
    solver = SOLVERS["plain"]

    def loss(x, adjoint):
        sol = optx.fixed_point(
            cell, solver, jnp.zeros(4), x, adjoint=adjoint, throw=False
        )
        return jnp.sum(jnp.sin(sol.value))

    for derivative in (jax.jacfwd(loss), jax.hessian(loss)):
        derivative = jax.jit(derivative, static_argnums=1)
        value, truth = derivative(x, adjoint), derivative(x, exact)
        assert relative_error(value, truth) < 1e4 * RTOL


def test_errors():
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.ones((3, 2))),
            jnp.ones(3),
            inn.FixedPointLinearSolver(SOLVERS["plain"]),
        )
    with pytest.raises(ValueError, match="real"):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.eye(3, dtype=complex)),
            jnp.ones(3, complex),
            inn.FixedPointLinearSolver(SOLVERS["plain"]),
        )
