import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from .helpers import DenseCell, make_matrix, tolerance


def bistable(z, x):
    """Two equilibria that attract, and one between them that does not."""
    return {"z": jnp.tanh(2 * z["z"] + 0.1 * x)}


def layer(max_steps=256):
    rtol = tolerance(1e-5, 1e-9)
    return inn.DeepEquilibriumNetwork(
        bistable,
        inn.AndersonAcceleration(rtol, 0.0),
        zero_state=lambda x: {"z": jnp.zeros_like(x)},
        max_steps=max_steps,
    )


STARTS = {"z": jnp.array([[0.3], [1.0], [-1.0], [-2.0]])}


def test_given_starts():
    many = inn.solve_from_starts(layer(), jnp.ones(1), STARTS)
    states = many.solutions.z_star["z"][:, 0]
    assert jnp.all(jnp.sign(states) == jnp.array([1.0, 1.0, -1.0, -1.0]))
    assert many.num_distinct == 2
    # Two of the six pairs agree, and four are opposite.
    assert many.path_independence == pytest.approx(-1 / 3, abs=1e-3)
    residuals = jnp.abs(many.solutions.residual["z"][:, 0])
    assert many.best_start == jnp.argmin(residuals)
    assert many.best.z_star["z"] == states[many.best_start]
    assert many.best.result == optx.RESULTS.successful


def test_solves_that_fail_are_not_counted():
    many = inn.solve_from_starts(layer(max_steps=1), jnp.ones(1), STARTS)
    assert many.num_distinct == 0
    nan = {"z": jnp.array([[jnp.nan], [0.9]])}
    many = inn.solve_from_starts(layer(), jnp.ones(1), nan)
    assert many.best_start == 1 and many.num_distinct == 1


def test_random_starts_around_the_own_one_of_every_example():
    key = jr.key(0)
    cell = DenseCell(make_matrix(6, 0.5), make_matrix(6, 1.0, seed=1)[:, :4])
    deq = inn.DeepEquilibriumNetwork(
        cell, init=lambda x: jnp.full(6, x[0]), max_steps=100
    )
    xs = jr.normal(key, (3, 4))
    solve = eqx.filter_jit(
        jax.vmap(
            lambda x: inn.solve_from_starts(deq, x, np.int64(4), scale=0.1, key=key)
        )
    )
    many = solve(xs)
    z0 = many.solutions.z0
    assert z0.shape == (3, 4, 6)
    assert jnp.all(z0[:, 0] == xs[:, :1])
    spread = jnp.std(z0 - z0[:, :1])
    assert 0.05 < spread < 0.2
    # A contraction has one equilibrium.
    assert jnp.all(many.num_distinct == 1)
    assert jnp.all(many.path_independence > 0.999)
    assert np.allclose(many.best.z_star, jax.vmap(deq)(xs), atol=1e-3)


def test_the_best_one_has_the_gradient_of_the_layer():
    x, z0s = jnp.ones(1), {"z": jnp.array([[0.9], [1.1]])}

    def loss(x):
        return inn.solve_from_starts(layer(), x, z0s).best.z_star["z"][0]

    value, gradient = jax.value_and_grad(loss)(x)
    slope = 1 - float(value) ** 2
    assert float(gradient[0]) == pytest.approx(0.1 * slope / (1 - 2 * slope), rel=1e-3)


@pytest.mark.parametrize(
    ("starts", "key", "message"),
    [
        (0, None, "an integer of at least 1"),
        (2, None, "must be given for random starts"),
        ({"z": jnp.zeros(())}, None, "one leading axis"),
        ({"z": jnp.zeros((0, 1))}, None, "one leading axis"),
        (None, None, "one leading axis"),
    ],
)
def test_wrong_starts(starts, key, message):
    with pytest.raises(ValueError, match=message):
        inn.solve_from_starts(layer(), jnp.ones(1), starts, key=key)
