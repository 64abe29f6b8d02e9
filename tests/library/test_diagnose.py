import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import Broyden, NewtonKrylov, residual_trace

from .helpers import dense_cell, linear_map, make_matrix, make_vector, problem


# Of every kind that Optimistix has, and whether it tells how often it evaluated.
SOLVERS = {
    "anderson": (inn.AndersonAcceleration(1e-3, 0.0), True),
    "broyden": (Broyden(1e-3, 0.0), True),
    "newton_krylov": (NewtonKrylov(1e-3, 0.0), True),
    "steady_state": (inn.SteadyState(dfx.Tsit5(), 1e-3, 0.0), True),
    "steady_state_implicit": (inn.SteadyState(dfx.Kvaerno3(), 1e-3, 0.0), False),
    "fixed_point_iteration": (optx.FixedPointIteration(1e-3, 1e-3), False),
    "best_so_far": (
        optx.BestSoFarFixedPoint(optx.FixedPointIteration(1e-3, 1e-3)),
        False,
    ),
    "newton": (optx.Newton(1e-3, 1e-3), False),
    "chord": (optx.Chord(1e-3, 1e-3), False),
    "levenberg_marquardt": (optx.LevenbergMarquardt(1e-3, 1e-3), False),
    "bfgs": (optx.BFGS(1e-3, 1e-3), False),
    "gradient_descent": (optx.GradientDescent(0.5, 1e-3, 1e-3), False),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name):
    solver, tells = SOLVERS[name]
    cell, x = dense_cell(4, 0.5), 0.3 * make_vector(4)
    max_steps = 20
    trace = residual_trace(cell, solver, jnp.zeros(4), x, max_steps=max_steps)
    assert trace.absolute.shape == trace.relative.shape == (max_steps + 1,)
    start = cell(jnp.zeros(4), x)
    assert np.allclose(trace.absolute[0], jnp.linalg.norm(start), rtol=1e-5)
    assert np.allclose(trace.relative[0], 1, rtol=1e-5)
    assert jnp.min(trace.relative) < 0.9
    n = int(trace.num_steps)
    assert np.all(np.asarray(trace.absolute[n:]) == trace.absolute[n])
    sol = optx.fixed_point(
        cell, solver, jnp.zeros(4), x, max_steps=max_steps, throw=False
    )
    assert n == sol.stats["num_steps"]
    assert trace.result == sol.result
    assert (trace.nfe is not None) == (tells or name == "fixed_point_iteration")
    assert (trace.num_matvecs is not None) == (name == "newton_krylov")
    if trace.num_matvecs is not None:
        assert trace.num_matvecs[0] == 0
        assert trace.num_matvecs[-1] == sol.stats["num_matvecs"] > 0
    if tells:
        assert trace.nfe[-1] == trace.nfe[n] == sol.stats["nfe"]
        assert np.all(np.diff(trace.nfe[: n + 1]) > 0)


def test_iterates_of_plain_iteration():
    args = make_matrix(5, 0.9), make_vector(5)
    solver = optx.FixedPointIteration(0.0, 0.0)
    trace = residual_trace(linear_map, solver, jnp.zeros(5), args, max_steps=6)
    z, absolute, relative = jnp.zeros(5), [], []
    for _ in range(7):
        f = linear_map(z, args)
        absolute.append(float(jnp.linalg.norm(f - z)))
        relative.append(float(jnp.linalg.norm(f - z) / jnp.linalg.norm(f)))
        z = f
    assert np.allclose(trace.absolute, absolute, rtol=1e-4)
    assert np.allclose(trace.relative, relative, rtol=1e-4)
    assert trace.result == optx.RESULTS.nonlinear_max_steps_reached
    assert trace.num_steps == 6
    assert np.array_equal(trace.nfe, np.arange(7))


@pytest.mark.parametrize("name", ("dense", "conv", "pair"))
def test_states(name):
    cell, x = problem(name)
    z0 = jax.tree.map(jnp.zeros_like, x)
    solver = inn.AndersonAcceleration(1e-3, 0.0)
    trace = residual_trace(cell, solver, z0, x, max_steps=40)
    assert trace.result == optx.RESULTS.successful
    assert trace.relative[trace.num_steps - 1] <= 1e-3


def test_jit_and_vmap():
    matrix = make_matrix(5, 0.9)
    vectors = jnp.stack([0 * make_vector(5), make_vector(5), 1e-3 * make_vector(5, 3)])

    @jax.jit
    def run(vector):
        return residual_trace(
            lambda z, v: jnp.tanh(matrix @ z + v),
            inn.AndersonAcceleration(0.0, 1e-4),
            jnp.zeros(5),
            vector,
            max_steps=20,
        )

    together = jax.vmap(run)(vectors)
    assert together.absolute.shape == together.nfe.shape == (3, 21)
    assert together.num_steps.shape == (3,)
    for i in range(3):
        alone = run(vectors[i])
        assert alone.num_steps == together.num_steps[i]
        assert np.array_equal(alone.nfe, together.nfe[i])
        assert np.allclose(alone.absolute, together.absolute[i], rtol=1e-2, atol=1e-6)
    # From the fixed point on: no division by zero.
    assert np.all(np.asarray(together.relative[0]) == 0)


def test_does_not_count_its_own_evaluations():
    evaluations = []

    def cell(z, args):
        jax.debug.callback(lambda: evaluations.append(None))
        return jnp.tanh(linear_map(z, args))

    args = make_matrix(5, 0.9), make_vector(5)
    solver = inn.AndersonAcceleration(1e-3, 0.0)
    trace = residual_trace(cell, solver, jnp.zeros(5), args, max_steps=30)
    jax.block_until_ready(trace)
    jax.effects_barrier()
    num_steps = int(trace.num_steps)
    assert trace.nfe[-1] == num_steps
    assert len(evaluations) == 2 * num_steps + 1


def test_nonfinite():
    trace = residual_trace(
        lambda z, _: jnp.where(z < 5, z + 1, jnp.nan),
        optx.FixedPointIteration(1e-3, 1e-3),
        jnp.zeros(2),
        max_steps=10,
    )
    assert trace.result == optx.RESULTS.nonfinite
    assert np.all(np.isfinite(trace.absolute[:5]))
    assert np.all(np.isnan(trace.absolute[-1]))
