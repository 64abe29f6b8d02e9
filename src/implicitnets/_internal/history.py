"""A solver's memory of several vectors.

Vectors are pytrees like the state of the solve; a history of them has a matrix for
every leaf, a row for every vector. Rows are flat because XLA on CPU would otherwise
reshape the history in every product, and copy the whole of it in every step.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .pytree import working_dtype


# Float32 products in float32 on every platform: accelerators have less by default.
_EXACT = jax.lax.Precision.HIGHEST


def empty_history(
    num_rows: int, vector: PyTree[Array], dtype: Any = None
) -> PyTree[Array]:
    """Zeros with room for vectors like this one, in `dtype` or in the vector's own."""
    return jtu.tree_map(
        lambda x: jnp.zeros((num_rows, x.size), x.dtype if dtype is None else dtype),
        vector,
    )


def history_set(
    history: PyTree[Array], row: int | Int[Array, ""], vector: PyTree[Array]
) -> PyTree[Array]:
    """Replace one vector, in place where `row` is the same for a whole batch."""

    def replace(matrix, x):
        x = x.reshape(-1).astype(matrix.dtype)
        return jax.lax.dynamic_update_index_in_dim(matrix, x, row, axis=0)

    return jtu.tree_map(replace, history, vector)


def history_get(
    history: PyTree[Array], row: int | Int[Array, ""], like: PyTree[Array]
) -> PyTree[Array]:
    """One vector, in the shape of another and the dtype of the history."""

    def get(matrix, x):
        flat = jax.lax.dynamic_index_in_dim(matrix, row, keepdims=False)
        return flat.reshape(x.shape)

    return jtu.tree_map(get, history, like)


def history_dot(history: PyTree[Array], vector: PyTree[Array]) -> Float[Array, " rows"]:
    """The inner products of every vector with one, in the working dtype."""
    dtype = working_dtype(vector)

    # A product with a matrix, not multiply and sum: three to six times as fast on CPU.
    def dot(matrix, x):
        x = x.reshape(-1).astype(dtype)
        return jnp.dot(matrix.astype(dtype), x, precision=_EXACT)

    products = jtu.tree_leaves(jtu.tree_map(dot, history, vector))
    return ft.reduce(jnp.add, products)


def history_combine(
    coefficients: Float[Array, " rows"], history: PyTree[Array], like: PyTree[Array]
) -> PyTree[Array]:
    """The linear combination of the vectors, in the dtype of the coefficients."""
    dtype = coefficients.dtype

    def combine(matrix, x):
        flat = jnp.dot(coefficients, matrix.astype(dtype), precision=_EXACT)
        return flat.reshape(x.shape)

    return jtu.tree_map(combine, history, like)
