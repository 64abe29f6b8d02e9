import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import (
    is_double,
    make_matrix,
    make_vector,
    relative_error,
    tolerance,
)


SIZE = 4
WEIGHT = make_matrix(SIZE, 0.9)
LOSS_WEIGHTS = make_vector(SIZE, seed=3)
PARAMS = WEIGHT, 0.3 * make_vector(SIZE), 0.1 * jnp.ones(SIZE)
DAMPING = 0.5
# As many steps as can be undone, and as many as can not.
FEW, MANY = (16, 48) if is_double() else (6, 24)


def cell(z, args):
    weight, x = args
    return jnp.tanh(weight @ z + x)


def unrolled(params, num_steps):
    weight, x, z0 = params

    def step(pair, _):
        y, z = pair
        y = DAMPING * y + (1 - DAMPING) * cell(z, (weight, x))
        z = DAMPING * z + (1 - DAMPING) * cell(y, (weight, x))
        return (y, z), None

    (y, _), _ = jax.lax.scan(step, (z0, z0), length=num_steps)
    return jnp.sum(LOSS_WEIGHTS * y)


def solve(params, adjoint, num_steps):
    weight, x, z0 = params
    return optx.fixed_point(
        lambda z, x: cell(z, (weight, x)),
        inn.ReversibleFixedPoint(0.0, 0.0, damping=DAMPING),
        z0,
        x,
        adjoint=adjoint,
        max_steps=num_steps,
        throw=False,
    ).value


def loss(params, probe, num_steps, fallback, bound=0.1):
    adjoint = inn.ReversibleAdjoint(fallback, bound, probe=probe)
    return jnp.sum(LOSS_WEIGHTS * solve(params, adjoint, num_steps))


FALLBACK = inn.PhantomAdjoint(3)
GRADIENT = eqx.filter_jit(jax.value_and_grad(loss, argnums=(0, 1)))


def test_gradient_is_that_of_unrolling():
    """For a closure, an argument and the initial guess."""
    value, (grads, report) = GRADIENT(PARAMS, inn.AdjointReport.probe(), FEW, FALLBACK)
    expected = jax.value_and_grad(unrolled)(PARAMS, FEW)
    assert np.allclose(value, expected[0], rtol=1e-5)
    for got, want in zip(grads, expected[1], strict=True):
        assert relative_error(got, want) < tolerance(1e-4, 1e-6)
    assert report.successful and report.num_steps == 2 * FEW
    assert jnp.finfo(float).eps < report.residual < tolerance(1e-3, 1e-4)


@pytest.mark.parametrize("fallback_name", ("phantom", "unrolling"))
def test_error_is_visible_and_the_fallback_taken(fallback_name):
    unrolling = optx.RecursiveCheckpointAdjoint()
    fallback = FALLBACK if fallback_name == "phantom" else unrolling
    probe = inn.AdjointReport.probe()
    _, (grads, report) = GRADIENT(PARAMS, probe, MANY, fallback)
    assert report.residual > 10 and not report.successful
    assert "could not be reconstructed" in repr(report.status)
    if fallback_name == "phantom":

        def phantom_loss(params):
            return jnp.sum(LOSS_WEIGHTS * solve(params, FALLBACK, MANY))

        expected = jax.jit(jax.grad(phantom_loss))(PARAMS)
        assert jnp.all(grads[2] == 0)
    else:
        expected = jax.grad(unrolled)(PARAMS, MANY)
    assert relative_error(grads, expected) < tolerance(1e-4, 1e-9)


def test_fallback_of_each_example():
    """Reconstruction is hardest for the map whose Jacobian is largest."""
    scales = jnp.array([0.0, 1.0])
    bound = 1e-3
    num_steps = 36 if is_double() else 13

    def of_scale(scale, probe):
        weight, x, z0 = PARAMS
        params = scale * weight, x, z0
        return loss(params, probe, num_steps, FALLBACK, bound)

    def total(scales, probes):
        return jnp.sum(jax.vmap(of_scale)(scales, probes))

    probes = inn.AdjointReport.probe((2,))
    grads, report = jax.jit(jax.grad(total, argnums=(0, 1)))(scales, probes)
    assert report.successful.tolist() == [True, False]
    weight, x, z0 = PARAMS

    def exact(scale):
        return unrolled((scale * weight, x, z0), num_steps)

    def phantom(scale):
        params = scale * weight, x, z0
        return jnp.sum(LOSS_WEIGHTS * solve(params, FALLBACK, num_steps))

    assert np.allclose(grads[0], jax.grad(exact)(scales[0]), rtol=1e-3)
    assert np.allclose(grads[1], jax.jit(jax.grad(phantom))(scales[1]), rtol=1e-4)


def test_half_precision():
    params = jax.tree_util.tree_map(lambda a: a.astype(jnp.bfloat16), PARAMS)

    @jax.jit
    @jax.grad
    def gradient(params):
        adjoint = inn.ReversibleAdjoint()
        y = solve(params, adjoint, 4)
        return jnp.sum(LOSS_WEIGHTS.astype(y.dtype) * y)

    grads = gradient(params)
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    assert relative_error(grads, jax.grad(unrolled)(PARAMS, 4)) < 0.05


def test_solver_in_a_layer():
    """To its tolerance, and with the best iterate if there is none better."""
    solver = inn.ReversibleFixedPoint(1e-4, 0.0, damping=0.2)
    deq = inn.DeepEquilibriumNetwork(
        lambda z, x: jnp.tanh(WEIGHT @ z + x), solver, adjoint=inn.ReversibleAdjoint()
    )
    sol = jax.jit(deq.solve)(PARAMS[1])
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["nfe"] == 2 * sol.stats["num_steps"] < 200
    assert optx.two_norm(sol.residual) <= 1.1e-4 * optx.two_norm(sol.z_star)

    def away(z, x):
        return 3 * z + x

    absolute = inn.ReversibleFixedPoint(0.0, 1e-4, damping=0.2)
    diverging = inn.DeepEquilibriumNetwork(
        away, absolute, adjoint=inn.ReversibleAdjoint()
    )
    gradient = jax.value_and_grad(lambda x: jnp.sum(diverging(x, z0=jnp.ones(1))))
    value, grad = jax.jit(gradient)(jnp.ones(1))
    # Of the first step, where the residual is least: 0.2 + 0.8 (3 + 1).
    assert np.allclose(value, 3.4, rtol=1e-5) and np.allclose(grad, 0.8, rtol=1e-5)


def test_other_solvers():
    deq = inn.DeepEquilibriumNetwork(
        lambda z, x: 0.5 * z + x, adjoint=inn.ReversibleAdjoint()
    )
    with pytest.raises(TypeError, match="ReversibleFixedPoint.*AndersonAcceleration"):
        deq(jnp.ones(2))
