import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx

import implicitnets as inn
from implicitnets import nn

from ..helpers import make_vector, relative_error


def test_every_input_has_one_equilibrium():
    """Also with huge parameters, found by plain iteration from anywhere."""
    cell = nn.WellPosedCell(3, 8, bound=0.9, activation=jnp.tanh, key=jr.key(0))
    cell = eqx.tree_at(
        lambda c: c.weight.weight, cell, 1e3 * jr.normal(jr.key(1), (8, 8))
    )
    solver = optx.FixedPointIteration(1e-5, 1e-5)
    deq = inn.DeepEquilibriumNetwork(cell, solver, zero_state=lambda x: jnp.zeros(8))
    x = 10 * make_vector(3)
    z0s = 100 * jr.normal(jr.key(2), (4, 8))
    sols = eqx.filter_jit(lambda d: jax.vmap(lambda z0: d.solve(x, z0=z0))(z0s))(deq)
    assert jnp.all(sols.result == optx.RESULTS.successful)
    assert relative_error(sols.z_star, sols.z_star[:1].repeat(4, 0)) < 1e-3


def test_contraction():
    cell = nn.WellPosedCell(3, 8, bound=0.7, key=jr.key(0))
    cell = eqx.tree_at(lambda c: c.weight.weight, cell, replace_fn=lambda a: 50 * a)
    x, z, w = make_vector(3), make_vector(8), make_vector(8, seed=5)
    distance = jnp.max(jnp.abs(cell(z, x) - cell(w, x)))
    assert distance <= 0.7 * jnp.max(jnp.abs(z - w)) * (1 + 1e-5)
