import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import implicitnets as inn
from implicitnets import nn

from ..helpers import make_matrix, make_vector, relative_error


@pytest.mark.parametrize(
    "shape, axes, mask_shape",
    (
        ((3, 50), 0, (1, 50)),
        ((50, 3), 1, (50, 1)),
        ((50, 3), -1, (50, 1)),
        ((40, 2, 3), (1, 2), (40, 1, 1)),
        ((8, 9), (), (8, 9)),
    ),
)
def test_mask_is_shared(shape, axes, mask_shape):
    out = nn.VariationalDropout(0.4, axes)(jnp.ones(shape), key=jr.key(0))
    reduced = tuple(i for i, n in enumerate(mask_shape) if n == 1 and shape[i] > 1)
    kept = out != 0
    assert jnp.all(jnp.any(kept, axis=reduced) == jnp.all(kept, axis=reduced))
    assert np.allclose(out[kept], 1 / 0.6)
    assert 0.3 < jnp.mean(kept) < 0.9


def test_mean_is_kept():
    dropout = nn.VariationalDropout(0.25)
    out = dropout(jnp.ones(40_000), key=jr.key(1))
    assert np.isclose(jnp.mean(out), 1, atol=0.02)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.float32))
def test_keeps_the_dtype_and_is_finely_drawn(dtype):
    out = nn.VariationalDropout(1e-3)(jnp.ones(40_000, dtype), key=jr.key(1))
    assert out.dtype == dtype
    assert 10 < jnp.sum(out == 0) < 90


def test_inference_and_zero_probability():
    x = make_vector(4)
    dropout = nn.VariationalDropout(0.5)
    assert jnp.all(eqx.nn.inference_mode(dropout)(x) == x)
    assert jnp.all(nn.VariationalDropout(0.0)(x) == x)
    with pytest.raises(ValueError, match="needs a `key`"):
        dropout(x)


def test_traced_probability_does_not_recompile():
    num_traces = 0

    @eqx.filter_jit
    def run(dropout):
        nonlocal num_traces
        num_traces += 1
        return dropout(jnp.ones(8), key=jr.key(0))

    run(nn.VariationalDropout(jnp.array(0.1)))
    run(nn.VariationalDropout(jnp.array(0.2)))
    assert num_traces == 1


class DropoutCell(eqx.Module):
    weight: jax.Array
    dropout: nn.VariationalDropout

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(self.dropout(z, key=key) @ self.weight.T + x)


def test_one_mask_a_solve_and_its_gradient():
    weight, x = make_matrix(5, 0.5), make_vector(15).reshape(3, 5)
    key = jr.key(4)
    cell = DropoutCell(weight, nn.VariationalDropout(0.4, shared_axes=0))

    def loss(cell, depth):
        deq = inn.DeepEquilibriumNetwork(
            cell, inn.AndersonAcceleration(1e-6, 1e-6), fixed_depth=depth
        )
        z = deq(x, key=key)
        return jnp.sum(jnp.sin(z)), z

    run = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (_, z), grads = run(cell, 0)
    assert relative_error(cell(z, x, key=key), z) < 1e-5
    (_, unrolled_z), unrolled_grads = run(cell, 60)
    assert relative_error(z, unrolled_z) < 1e-4
    assert relative_error(grads.weight, unrolled_grads.weight) < 1e-3
    assert relative_error(cell(z, x, key=jr.key(5)), z) > 1e-2
    inference = eqx.nn.inference_mode(inn.DeepEquilibriumNetwork(cell))
    z = inference(x)
    assert relative_error(jnp.tanh(z @ weight.T + x), z) < 1e-3


def test_each_example_of_a_batch_has_its_own_mask():
    dropout = nn.VariationalDropout(0.5)
    keys = jr.split(jr.key(0), 3)
    out = jax.vmap(lambda key: dropout(jnp.ones(20), key=key))(keys)
    assert not jnp.all(out[0] == out[1])
