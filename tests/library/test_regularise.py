import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn
from implicitnets import growing_weight, jacobian_penalty, sometimes

from .helpers import dense_cell, make_vector, problem, relative_error, tolerance


@pytest.mark.parametrize("name", ("dense", "pair"))
def test_estimates_the_frobenius_norm(name):
    cell, x = problem(name)
    z = jax.tree.map(lambda leaf: 0.3 * leaf, x)
    flat, unravel = ravel_pytree(z)
    jacobian = jax.jacobian(lambda v: ravel_pytree(cell(unravel(v), x))[0])(flat)
    exact = jnp.sum(jacobian**2) / flat.size

    @jax.jit
    @jax.vmap
    def estimate(key):
        return jacobian_penalty(cell, z, x, key=key, num_samples=4)

    estimates = estimate(jr.split(jr.key(0), 5000))
    assert np.allclose(jnp.mean(estimates), exact, rtol=0.03)
    assert np.std(estimates) > 0


def test_gradient_with_and_without_the_equilibrium():
    cell, x = dense_cell(4, 0.7), make_vector(4)
    key = jr.key(0)
    deq = inn.DeepEquilibriumNetwork(
        cell,
        inn.AndersonAcceleration(tolerance(1e-6, 1e-12), 0.0),
        adjoint=inn.ImplicitAdjoint(inn.GivensGMRES(tolerance(1e-5, 1e-12), 0.0)),
    )

    @eqx.filter_jit
    def penalty(hidden, detach, where=None):
        layer = eqx.tree_at(lambda d: d.cell.hidden, deq, hidden)
        z = layer(x) if where is None else where
        return jacobian_penalty(layer.cell, z, x, key=key, detach=detach)

    gradient = eqx.filter_jit(jax.grad(penalty))
    z_star = deq(x)
    constant = gradient(cell.hidden, True)
    assert relative_error(constant, gradient(cell.hidden, True, z_star)) < 1e-4
    exact = gradient(cell.hidden, False)
    assert relative_error(constant, exact) > 1e-2
    direction = make_vector(16).reshape(4, 4)
    eps = tolerance(1e-2, 1e-4)
    difference = (
        penalty(cell.hidden + eps * direction, False)
        - penalty(cell.hidden - eps * direction, False)
    ) / (2 * eps)
    assert np.allclose(jnp.sum(exact * direction), difference, rtol=1e-2)


def test_sometimes():
    @jax.jit
    def run(key):
        return sometimes(0.3, lambda key: 1 + jr.uniform(key), key=key)

    values = np.asarray([run(key) for key in jr.split(jr.key(0), 400)])
    assert 0.2 < np.mean(values > 0) < 0.4
    assert len(set(values[values > 0].tolist())) > 50
    assert "cond" in str(jax.make_jaxpr(run)(jr.key(0)))


def test_growing_weight():
    schedule = jax.jit(growing_weight(2.0, 0.5, 10, begin=5))
    weights = [float(schedule(step)) for step in (0, 4, 5, 14, 15, 25)]
    assert weights == [0, 0, 2, 2, 2.5, 3]


def test_a_growing_weight_has_the_dtype_of_the_penalty():
    weight = growing_weight(2.0, 0.5, 10)(jnp.int32(25))
    for dtype in (jnp.bfloat16, jnp.float32):
        assert (weight * jnp.ones((), dtype)).dtype == dtype
