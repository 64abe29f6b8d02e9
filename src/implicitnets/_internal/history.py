"""A solver's memory of several vectors.

Vectors are pytrees like the state of the solve; a history of them has a matrix for
every leaf, a row for every vector. Rows are flat because XLA on CPU would otherwise
reshape the history in every product, and copy the whole of it in every step.
"""

import functools as ft
from typing import Any

import jax
import jax.extend.core as jec
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .manual import out_type
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
        return _write_p.bind(matrix, x[None], jnp.asarray(row), axis=0)

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


# `jax.lax.dynamic_update_slice` of a batch is a scatter, also where all examples write
# at one index (`_dynamic_update_slice_batching_rule` in `jax/_src/lax/slicing.py`). XLA
# makes a slice of it again, but one that first reads what is there, in case that the
# index is out of bounds: on a GPU that is two more kernels a write.
_write_p = jec.Primitive("write_row")


def _write(matrix, rows, index, *, axis):
    return jax.lax.dynamic_update_slice_in_dim(matrix, rows, index, axis)


def _abstract_eval(*args, axis):
    return out_type(ft.partial(_write, axis=axis), *args)


def _batch(args, axes, *, axis):
    matrix, rows, index = args
    matrix_axis, rows_axis, index_axis = axes
    # Explicit axes of a mesh: JAX' own rule knows what to do with them.
    is_divided = any(any(jax.typeof(x).sharding.spec) for x in (matrix, rows))
    if index_axis is not None or is_divided:
        write = ft.partial(_write, axis=axis)
        return jax.vmap(write, in_axes=axes)(*args), 0
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    matrix = batching.bdim_at_front(matrix, matrix_axis, size)
    rows = batching.bdim_at_front(rows, rows_axis, size)
    return _write_p.bind(matrix, rows, index, axis=axis + 1), 0


def _jvp(primals, tangents, *, axis):
    matrix, rows, index = primals
    matrix_dot, rows_dot = map(ad.instantiate_zeros, tangents[:2])
    return (
        _write_p.bind(matrix, rows, index, axis=axis),
        _write(matrix_dot, rows_dot, index, axis=axis),
    )


_write_p.def_impl(_write)
_write_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_write_p] = _batch
ad.primitive_jvps[_write_p] = _jvp
mlir.register_lowering(_write_p, mlir.lower_fun(_write, multiple_results=False))
