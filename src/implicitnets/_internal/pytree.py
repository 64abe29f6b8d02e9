"""Arithmetic on pytrees, each treated as one vector."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar


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


def tree_astype(tree: PyTree[Array], dtype: Any) -> PyTree[Array]:
    """Cast every leaf of a pytree.

    **Arguments:**

    - `tree`: a pytree of arrays.
    - `dtype`: the dtype to cast to.

    **Returns:**

    The pytree, in that dtype.
    """
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def tree_cast_like(tree: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """Cast every leaf of a pytree to the dtype of another's.

    **Arguments:**

    - `tree`: a pytree of arrays.
    - `like`: arrays or `jax.ShapeDtypeStruct`s, of the same structure.

    **Returns:**

    The pytree, in those dtypes.
    """
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), tree, like)


def tree_ravel(tree: PyTree[Array]) -> PyTree[Array]:
    """Flatten every leaf of a pytree to one axis.

    **Arguments:**

    - `tree`: a pytree of arrays.

    **Returns:**

    The pytree of vectors.
    """
    return jtu.tree_map(jnp.ravel, tree)


def tree_reshape_like(tree: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """Reshape every leaf of a pytree to the shape of another's.

    **Arguments:**

    - `tree`: a pytree of arrays.
    - `like`: arrays or `jax.ShapeDtypeStruct`s, of the same structure.

    **Returns:**

    The pytree, in those shapes.
    """
    return jtu.tree_map(lambda x, y: x.reshape(y.shape), tree, like)


def tree_normal(key: PRNGKeyArray, like: PyTree[Array]) -> PyTree[Array]:
    """Standard normal numbers.

    **Arguments:**

    - `key`: a random key.
    - `like`: the structure, shapes and dtypes.

    **Returns:**

    A pytree like `like`.
    """
    leaves, treedef = jtu.tree_flatten(like)
    keys = jr.split(key, len(leaves))
    return jtu.tree_unflatten(
        treedef,
        [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )


def tree_all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every element of every leaf is finite.

    **Arguments:**

    - `tree`: a pytree of arrays.

    **Returns:**

    A boolean scalar.
    """
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]).all()
