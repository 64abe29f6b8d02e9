import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from implicitnets._internal.history import history_set

from ..helpers import tolerance


def write_by_index(history, row, vector):
    return history.at[row].set(vector)


# Which of history, row and vector has an axis of the batch, the last but one as first
# and the last as second axis.
@pytest.mark.parametrize(
    "axes", [(None, None, 0), (0, None, None), (0, 0, 0), (1, None, 1), (None, 0, None)]
)
def test_writes_under_vmap(getkey, axes):
    def batch(axis, shape):
        if axis is None:
            return shape
        return (*shape[:axis], 3, *shape[axis:])

    history = jr.normal(getkey(), batch(axes[0], (4, 5)))
    row = jr.randint(getkey(), batch(axes[1], ()), 0, 4)
    vector = jr.normal(getkey(), batch(axes[2], (5,)))
    written = jax.vmap(history_set, in_axes=axes)(history, row, vector)
    expected = jax.vmap(write_by_index, in_axes=axes)(history, row, vector)
    assert np.array_equal(written, expected)


def test_derivatives(getkey):
    history, vector = jr.normal(getkey(), (4, 5)), jr.normal(getkey(), (5,))
    weights = jr.normal(getkey(), (4, 5))

    def loss(write, history, vector):
        return jnp.sum(weights * write(history, 2, vector) ** 3)

    for derivative in (jax.jacfwd, jax.grad):
        gradients = [
            derivative(lambda *args: loss(write, *args), argnums=(0, 1))(  # noqa: B023
                history, vector
            )
            for write in (history_set, write_by_index)
        ]
        for ours, expected in zip(*gradients, strict=True):
            assert jnp.max(jnp.abs(ours - expected)) < tolerance(1e-5, 1e-12)
