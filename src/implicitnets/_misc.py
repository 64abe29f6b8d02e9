import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree, Scalar


# Float32 products in float32 on every platform: accelerators have less by default.
_EXACT = jax.lax.Precision.HIGHEST


def working_dtype(tree: PyTree[Array]) -> jnp.dtype:
    """The dtype of a solver's scalars and small systems: at least float32.

    **Arguments:**

    - `tree`: a pytree of arrays or of `jax.ShapeDtypeStruct`s.

    **Returns:**

    float32 for half-precision leaves, otherwise the widest dtype of the leaves.
    """
    dtypes = [leaf.dtype for leaf in jtu.tree_leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def tree_dot(x: PyTree[Array], y: PyTree[Array]) -> Scalar:
    """The inner product of two pytrees, each treated as one vector.

    **Arguments:**

    - `x`, `y`: pytrees of one structure.

    **Returns:**

    A scalar of the working dtype.
    """
    dtype = working_dtype(x)
    products = jtu.tree_map(
        lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), x, y
    )
    return sum(jtu.tree_leaves(products), start=jnp.zeros((), dtype))


def history_dot(
    history: PyTree[Array], vector: PyTree[Array]
) -> Float[Array, " history"]:
    """The inner products of every vector of a history with one vector.

    **Arguments:**

    - `history`: a pytree with a leading history axis on every leaf.
    - `vector`: the same pytree without that axis.

    **Returns:**

    One inner product an entry, in the working dtype.
    """
    dtype = working_dtype(vector)

    # A product with a matrix, not multiply and sum: three to six times as fast on CPU,
    # inside a loop and under `vmap`.
    def dot(entries, x):
        matrix = entries.reshape(entries.shape[0], -1).astype(dtype)
        return jnp.dot(matrix, x.reshape(-1).astype(dtype), precision=_EXACT)

    products = jtu.tree_leaves(jtu.tree_map(dot, history, vector))
    return ft.reduce(jnp.add, products)


def history_combine(
    coefficients: Float[Array, " history"], history: PyTree[Array]
) -> PyTree[Array]:
    """The linear combination of the vectors of a history.

    **Arguments:**

    - `coefficients`: one an entry.
    - `history`: a pytree with a leading history axis on every leaf.

    **Returns:**

    A pytree of the structure of one vector, in the working dtype.
    """
    dtype = coefficients.dtype

    # A product with a matrix here too: the sum over the first axis is thirty times as
    # slow on CPU for the states of a convolution.
    def combine(entries):
        matrix = entries.reshape(entries.shape[0], -1).astype(dtype)
        out = jnp.dot(coefficients, matrix, precision=_EXACT)
        return out.reshape(entries.shape[1:])

    return jtu.tree_map(combine, history)


def history_set(
    history: PyTree[Array], index: Any, vector: PyTree[Array]
) -> PyTree[Array]:
    """Replace one vector of a history.

    **Arguments:**

    - `history`: a pytree with a leading history axis on every leaf.
    - `index`: which entry; in place where it is the same for a whole batch (see
        [`Unfrozen`][]).
    - `vector`: the new entry; cast to the dtype of the history.

    **Returns:**

    The new history.
    """
    return jtu.tree_map(
        lambda entries, x: jax.lax.dynamic_update_index_in_dim(
            entries, x.astype(entries.dtype), index, axis=0
        ),
        history,
        vector,
    )


def tree_all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every element of every leaf is finite.

    **Arguments:**

    - `tree`: a pytree of arrays.

    **Returns:**

    A boolean scalar.
    """
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]).all()


def check_hyperparameter(owner: Any, name: str, valid: bool, allowed: str) -> None:
    """Raise a `ValueError` that names a field, its value and what is allowed.

    **Arguments:**

    - `owner`: the module with the field.
    - `name`: the field's name.
    - `valid`: whether its value is allowed.
    - `allowed`: what is, in words.

    **Raises:**

    `ValueError` if not `valid`.
    """
    if not valid:
        value = getattr(owner, name)
        raise ValueError(
            f"`{type(owner).__name__}({name}=...)` must be {allowed}; got {value!r}."
        )


def check_tolerances(owner: Any) -> None:
    """Check the `rtol` and `atol` of a solver; traced ones pass unchecked.

    **Arguments:**

    - `owner`: a module with fields `rtol` and `atol`.

    **Raises:**

    `ValueError` if one is negative.
    """
    for name in ("rtol", "atol"):
        value = getattr(owner, name)
        if isinstance(value, int | float):
            check_hyperparameter(owner, name, value >= 0, "non-negative")
