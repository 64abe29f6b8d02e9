import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import implicitnets as inn


def _layers(key):
    return {
        "linear": eqx.nn.Linear(30, 40, key=key),
        "convolution": eqx.nn.Conv2d(8, 16, 3, key=key),
        "transpose": eqx.nn.ConvTranspose2d(8, 16, 3, use_bias=False, key=key),
        "norm": eqx.nn.GroupNorm(2, 8),
        "function": jnp.tanh,
    }


def test_he_uniform_by_default():
    layers = _layers(jr.key(0))
    drawn = inn.nn.initialise(layers, key=jr.key(1))
    for name, fan_in in (("linear", 30), ("convolution", 72), ("transpose", 72)):
        largest = jnp.max(jnp.abs(drawn[name].weight))
        assert largest == pytest.approx((6 / fan_in) ** 0.5, rel=0.05)
        assert drawn[name].weight.dtype == layers[name].weight.dtype
    assert not jnp.any(drawn["linear"].bias) and not jnp.any(drawn["convolution"].bias)
    assert drawn["transpose"].bias is None
    assert eqx.tree_equal(drawn["norm"], layers["norm"])
    assert drawn["function"] is jnp.tanh


def test_any_initialiser_and_a_key_for_every_layer():
    key = jr.key(0)
    twins = [eqx.nn.Linear(30, 40, key=key), eqx.nn.Linear(30, 40, key=key)]
    first, second = inn.nn.initialise(
        twins, jax.nn.initializers.normal(0.01), key=jr.key(1)
    )
    assert jnp.std(first.weight) == pytest.approx(0.01, rel=0.1)
    assert not jnp.any(first.weight == second.weight)
