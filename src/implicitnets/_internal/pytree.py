"""Arithmetic on pytrees, each treated as one vector."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar


def working_dtype(tree: PyTree[Array]) -> jnp.dtype:
    """The dtype of a solver's scalars and small systems: at least float32."""
    dtypes = [leaf.dtype for leaf in jtu.tree_leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def tree_dot(x: PyTree[Array], y: PyTree[Array]) -> Scalar:
    """The inner product of two pytrees, each treated as one vector."""
    dtype = working_dtype(x)
    products = jtu.tree_map(
        lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), x, y
    )
    return sum(jtu.tree_leaves(products), start=jnp.zeros((), dtype))


def tree_astype(tree: PyTree[Array], dtype: Any) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def tree_cast_like(tree: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """Cast every leaf of a pytree to the dtype of another's."""
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), tree, like)


def tree_ravel(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.ravel, tree)


def tree_reshape_like(tree: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """Reshape every leaf of a pytree to the shape of another's."""
    return jtu.tree_map(lambda x, y: x.reshape(y.shape), tree, like)


def tree_normal(key: PRNGKeyArray, like: PyTree[Array]) -> PyTree[Array]:
    """Standard normal numbers, in a pytree like another one."""
    leaves, treedef = jtu.tree_flatten(like)
    keys = jr.split(key, len(leaves))
    return jtu.tree_unflatten(
        treedef,
        [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )


def tree_all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]).all()
