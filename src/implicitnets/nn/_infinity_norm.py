from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._internal.checks import check_number, POSITIVE
from .._internal.parametrise import (
    AbstractParametrisation,
    Filter,
    is_parametrisation,
    parametrise,
    resolve,
)
from .._internal.pytree import working_dtype
from ._weight_norm import LINEAR_LAYERS


_Tree = TypeVar("_Tree")


class InfinityNorm(AbstractParametrisation):
    r"""A weight whose linear operator has a bounded infinity-norm.

    The Euclidean projection on $\lVert w \rVert_\infty \leq \mathrm{bound}$. It
    projects every row, which is everything that one output sees, on the ball of the
    one-norm. A weight within the bound stays as it is; rows outside become sparse. For
    a convolution of any stride, padding and shape this bounds the operator too: its
    rows are those of the kernel, or parts of them at the edges.

    A layer with a bound below one, followed by an activation that does not expand (the
    hyperbolic tangent, ReLU), is a contraction in the infinity-norm.

    The gradient goes through the projection. El Ghaoui et al., *Implicit Deep
    Learning*, 2021, project after each update instead: see
    [`implicitnets.nn.project`][]. The algorithm is in figure 1 of Duchi et al.,
    *Efficient Projections onto the l1-Ball*, 2008.

    **Arguments:**

    - `weight`: the weight, an array or another parametrisation.
    - `bound`: the largest infinity-norm allowed.
    """

    weight: Array | AbstractParametrisation
    bound: ScalarLike = 1.0

    def __check_init__(self):
        check_number(self, "bound", self.bound, POSITIVE)

    def value(self) -> Array:
        """As [`implicitnets.nn.AbstractParametrisation`][]."""
        weight = resolve(self.weight)
        rows = weight.reshape(weight.shape[0], -1).astype(working_dtype(weight))
        rows = _project_rows(rows, jnp.asarray(self.bound, rows.dtype))
        return rows.reshape(weight.shape).astype(weight.dtype)


def _project_rows(
    rows: Float[Array, "row column"], bound: Scalar
) -> Float[Array, "row column"]:
    sizes = jnp.abs(rows)
    sorted_sizes = jnp.sort(sizes, axis=1, descending=True)
    counts = jnp.arange(1, rows.shape[1] + 1, dtype=rows.dtype)[None, :]
    thresholds = (jnp.cumsum(sorted_sizes, axis=1) - bound) / counts
    # The last of the thresholds below its entry is also the largest of all.
    threshold = jnp.max(thresholds, axis=1, keepdims=True)
    projected = jnp.sign(rows) * jnp.maximum(sizes - threshold, 0)
    # As it is, and not with a threshold of zero, for the derivative at zero.
    return jnp.where(threshold > 0, projected, rows)


def infinity_norm(
    cell: _Tree, filter: Filter = LINEAR_LAYERS, *, bound: ScalarLike = 1.0
) -> _Tree:
    """Bound the infinity-norm of every chosen layer of a cell.

    [`implicitnets.nn.InfinityNorm`][] says what happens to a weight, and
    [`implicitnets.nn.resolve`][] says when.

    **Arguments:**

    - `cell`: any pytree.
    - `filter`: as [`implicitnets.nn.weight_norm`][].
    - `bound`: the largest infinity-norm allowed. Keyword only argument.

    **Returns:**

    The cell, with bounded weights.

    **Raises:**

    `ValueError` if the filter chooses no layer.
    """
    return parametrise(cell, filter, lambda layer: InfinityNorm(layer.weight, bound))


def project(tree: _Tree) -> _Tree:
    """Projected gradient descent: call it after every update of an optimiser.

    It puts a weight that has left the bound of its [`implicitnets.nn.InfinityNorm`][]
    back on it. Otherwise the weight drifts further outside, where the entries that the
    projection sets to zero get no gradient. What the model computes does not change.

    ```python
    model = eqx.apply_updates(model, updates)
    model = inn.nn.project(model)
    ```

    **Arguments:**

    - `tree`: any pytree.

    **Returns:**

    The pytree with these weights projected.
    """

    def project_node(node):
        if isinstance(node, InfinityNorm) and eqx.is_array(node.weight):
            return InfinityNorm(node.value(), node.bound)
        return node

    return jtu.tree_map(project_node, tree, is_leaf=is_parametrisation)
