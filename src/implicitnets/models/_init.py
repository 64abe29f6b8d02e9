from typing import TypeVar

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray


_Tree = TypeVar("_Tree")


def draw_normal(
    tree: _Tree, layers: type | tuple[type, ...], std: float, *, key: PRNGKeyArray
) -> _Tree:
    """Draw the weights and biases of layers anew, from a normal distribution.

    Small weights make a cell a contraction at first, so that there is an equilibrium
    and it is easy to find.

    **Arguments:**

    - `tree`: any pytree.
    - `layers`: the types of the layers whose weights to draw.
    - `std`: the standard deviation. The mean is zero.
    - `key`: a random key.

    **Returns:**

    The pytree with new weights.
    """

    def is_layer(node):
        return isinstance(node, layers)

    chosen, others = eqx.partition(tree, jtu.tree_map(is_layer, tree, is_leaf=is_layer))
    # One draw for all of them, as every shape would be compiled on its own.
    weights, unravel = ravel_pytree(chosen)
    normal = std * jr.normal(key, weights.shape, weights.dtype)
    return eqx.combine(unravel(normal), others)
