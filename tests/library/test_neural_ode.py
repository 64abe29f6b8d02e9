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
    MultiScaleNeuralODE,
    NeuralODE,
)

from .helpers import (
    dense_cell,
    is_double,
    make_matrix,
    make_vector,
    multiscale_layers,
    pair_cell,
    relative_error,
    SumCell,
    tolerance,
)


TOL = tolerance(1e-6, 1e-10)
ACCURATE = dfx.PIDController(rtol=TOL, atol=TOL)

# Euler steps of length one are applications of the cell.
UNROLLED = dict(
    solver=dfx.Euler(), t1=10.0, dt0=1.0, stepsize_controller=dfx.ConstantStepSize()
)


@pytest.mark.parametrize(
    "adjoint", (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint())
)
def test_state_at_the_final_time_and_its_gradient(adjoint):
    """A linear cell has the state `(1 - exp((A - 1) t)) (1 - A)^{-1} x`."""
    matrix, x = make_matrix(3, 0.5, symmetric=True), make_vector(3)
    a, b, t = np.asarray(matrix, float), np.asarray(x, float), 1.5
    values, vectors = np.linalg.eigh(a)
    flow = vectors @ np.diag((1 - np.exp((values - 1) * t)) / (1 - values)) @ vectors.T

    def loss(x):
        node = NeuralODE(
            lambda z, x: matrix @ z + x,
            dfx.Tsit5(),
            t1=t,
            stepsize_controller=ACCURATE,
            adjoint=adjoint,
        )
        sol = node.solve(x)
        return jnp.sum(sol.z_star), sol

    gradient, sol = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert sol.result == optx.RESULTS.successful
    assert relative_error(sol.z_star, flow @ b) < tolerance(1e-5, 1e-8)
    assert relative_error(gradient, flow.sum(0)) < tolerance(1e-5, 1e-8)
    residual = a @ np.asarray(sol.z_star) + b - np.asarray(sol.z_star)
    assert relative_error(sol.residual, residual) < tolerance(1e-4, 1e-8)


def test_backsolve_adjoint():
    x = make_vector(4)

    def loss(params, adjoint):
        cell, x = params
        node = NeuralODE(cell, stepsize_controller=ACCURATE, adjoint=adjoint)
        return jnp.sum(node(x) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    exact = gradient((dense_cell(), x), dfx.RecursiveCheckpointAdjoint())
    backsolved = gradient((dense_cell(), x), dfx.BacksolveAdjoint())
    assert relative_error(backsolved, exact) < tolerance(1e-3, 1e-6)


def test_follows_the_flow_to_the_equilibrium():
    cell, x = dense_cell(), make_vector(4)
    node = NeuralODE(cell, inn.VCABM3(), t1=50.0, init=lambda x: x)
    deq = inn.DeepEquilibriumNetwork(cell)
    sol = eqx.filter_jit(node.solve)(x)
    assert np.array_equal(sol.z0, x)
    assert relative_error(sol.z_star, eqx.filter_jit(deq)(x)) < 1e-2


def test_number_of_evaluations():
    """Against a count of what runs, which is one more: the residual."""
    count = 0

    def cell(z, x):
        def increment():
            nonlocal count
            count += 1

        jax.debug.callback(increment)
        return jnp.tanh(0.5 * z + x)

    for solver in (dfx.Tsit5(), dfx.Heun(), inn.VCABM3(), dfx.Euler()):
        controller = UNROLLED["stepsize_controller"]
        if not isinstance(solver, dfx.Euler):
            controller = dfx.PIDController(rtol=1e-3, atol=1e-3)
        node = NeuralODE(cell, solver, t1=5.0, stepsize_controller=controller)
        count = 0
        stats = eqx.filter_jit(node.solve)(make_vector(2)).stats
        jax.effects_barrier()
        assert stats["nfe"] == count - 1
        steps = stats["num_accepted_steps"] + stats["num_rejected_steps"]
        assert stats["num_steps"] == steps
    implicit = NeuralODE(dense_cell(), dfx.ImplicitEuler())
    assert "nfe" not in eqx.filter_eval_shape(implicit.solve, make_vector(4)).stats


def test_euler_unrolls_the_cell():
    cell = pair_cell()
    x = {"a": make_vector(2), "b": make_vector(4).reshape(2, 2)}
    sol = eqx.filter_jit(NeuralODE(cell, **UNROLLED).solve)(x)
    deq = inn.set_fixed_depth(inn.DeepEquilibriumNetwork(cell), 10)
    reference = eqx.filter_jit(deq)(x)
    assert relative_error(sol.z_star, reference) < tolerance(1e-5, 1e-12)
    assert sol.stats["nfe"] == 10


@pytest.mark.parametrize("solver", (dfx.Tsit5(), inn.VCABM3()))
def test_multiscale(solver):
    """The cases of SciML's test matrix."""
    layers = multiscale_layers((4, 2), key=jr.key(0))
    shapes = [(4,), (2,)]
    xs = make_vector(12).reshape(3, 4)
    node = MultiScaleNeuralODE(*layers, solver, state_shapes=shapes)

    def loss(params):
        node, xs = params
        sol = jax.vmap(node.solve)(xs)
        return sum(jnp.sum(leaf**2) for leaf in sol.z_star) + inn.skip_penalty(sol), sol

    gradients, sol = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((node, xs))
    assert np.all(sol.result == optx.RESULTS.successful)
    assert [leaf.shape[1:] for leaf in sol.z_star] == shapes
    for leaf in jtu.tree_leaves((sol, gradients)):
        assert np.all(np.isfinite(leaf))


def test_multiscale_start_and_unrolling():
    layers = multiscale_layers((2, 1), key=jr.key(0))
    x = make_vector(2)
    kwargs = dict(state_shapes=[(2,), (1,)], init=[lambda x: x, lambda x: x[:1]])
    sol = eqx.filter_jit(MultiScaleNeuralODE(*layers, **UNROLLED, **kwargs).solve)(x)
    deq = MultiScaleDeepEquilibriumNetwork(*layers, fixed_depth=10, **kwargs)
    assert eqx.tree_equal(sol.z0, (x, x[:1]))
    reference = eqx.filter_jit(deq)(x)
    assert relative_error(sol.z_star, reference) < tolerance(1e-4, 1e-10)
    assert sol.stats["nfe"] == 10


def test_half_precision():
    x = make_vector(4).astype(jnp.bfloat16)
    cell = jtu.tree_map(lambda w: w.astype(jnp.bfloat16), dense_cell())
    z = eqx.filter_jit(NeuralODE(cell))(x)
    assert z.dtype == jnp.bfloat16
    if is_double():
        x = x.astype(jnp.float32)
        cell = jtu.tree_map(lambda w: w.astype(jnp.float32), cell)
        assert eqx.filter_eval_shape(NeuralODE(cell), x).dtype == jnp.float32


def test_results():
    x = make_vector(4)
    too_few_steps = NeuralODE(dense_cell(), t1=100.0, max_steps=3)
    sol = eqx.filter_jit(too_few_steps.solve)(x)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    too_few_steps = eqx.tree_at(lambda node: node.throw, too_few_steps, True)
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        eqx.filter_jit(too_few_steps)(x)
    explosion = NeuralODE(lambda z, x: 1e30 * (z + x) ** 2, **UNROLLED)
    sol = eqx.filter_jit(explosion.solve)(1e9 * x)
    assert sol.result == optx.RESULTS.nonfinite
    explosion = eqx.tree_at(lambda node: node.throw, explosion, True)
    with pytest.raises(RuntimeError, match="Nonfinite"):
        eqx.filter_jit(explosion)(1e9 * x)


def test_normalised_weights():
    linear, x = eqx.nn.Linear(4, 4, key=jr.key(0)), make_vector(4)
    cell = SumCell(linear, eqx.nn.Identity())
    normalised = SumCell(inn.nn.weight_norm(linear), eqx.nn.Identity())
    z, z_normalised = eqx.filter_jit(
        lambda x: (NeuralODE(cell, **UNROLLED)(x), NeuralODE(normalised, **UNROLLED)(x))
    )(x)
    assert relative_error(z_normalised, z) < tolerance(1e-5, 1e-9)


def test_key():
    def cell(z, x, *, key):
        return jnp.tanh(0.5 * z + x) + jr.normal(key, z.shape)

    run = eqx.filter_jit(NeuralODE(cell, **UNROLLED))
    first, again, other = (run(make_vector(8), key=jr.key(k)) for k in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
