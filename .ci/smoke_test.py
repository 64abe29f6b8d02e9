"""That an installed package works: it solves, and differentiates what it solved."""

import sys

import jax
import jax.numpy as jnp

import implicitnets as inn


assert inn.__file__.startswith(sys.prefix), inn.__file__

deq = inn.DeepEquilibriumNetwork(lambda z, x: jnp.tanh(z / 2 + x))
x = jnp.array([-1.0, 0.2, 3.0])
z, gradient = deq(x), jax.grad(lambda x: deq(x).sum())(x)
slope = 1 - jnp.tanh(z / 2 + x) ** 2

assert jnp.allclose(z, jnp.tanh(z / 2 + x), atol=1e-3), z
assert jnp.allclose(gradient, slope / (1 - slope / 2), atol=1e-3), gradient
