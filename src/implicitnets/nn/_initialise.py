from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray


_Tree = TypeVar("_Tree")

_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)
# Equinox' weights have the outputs on their first axis.
_HE_UNIFORM = jax.nn.initializers.he_uniform(in_axis=1, out_axis=0)


def initialise(
    tree: _Tree,
    initialiser: jax.nn.initializers.Initializer = _HE_UNIFORM,
    *,
    key: PRNGKeyArray,
) -> _Tree:
    """Draws the weights of all linear and convolutional layers anew.

    Their biases become zero. Equinox draws weights and biases alike, between plus and
    minus one over the square root of the inputs, as PyTorch does. A cell with small
    weights passes on little of its input, so it learns much faster behind a stem that
    is louder: draw stem and head by the default, and a cell by
    `jax.nn.initializers.normal(0.01)`, with which it starts as a contraction.

    He, Zhang, Ren and Sun, *Delving Deep into Rectifiers*, 2015.

    **Arguments:**

    - `tree`: any pytree with layers of `eqx.nn`: `Linear`, and convolutions with their
        transposes.
    - `initialiser`: of the weights, whose first axis is of the outputs and whose second
        one of the inputs; by default He's uniform one.
    - `key`: for the weights. Keyword only argument.

    **Returns:**

    The pytree with its new weights.
    """

    def is_layer(node):
        return isinstance(node, _LAYERS)

    def draw(node, key):
        if not is_layer(node):
            return node
        weight = initialiser(key, node.weight.shape, node.weight.dtype)
        bias = None if node.bias is None else jnp.zeros_like(node.bias)
        return eqx.tree_at(
            lambda layer: (layer.weight, layer.bias),
            node,
            (weight, bias),
            is_leaf=lambda leaf: leaf is None,
        )

    nodes, treedef = jtu.tree_flatten(tree, is_leaf=is_layer)
    keys = jr.split(key, len(nodes))
    return jtu.tree_unflatten(
        treedef, [draw(*pair) for pair in zip(nodes, keys, strict=True)]
    )
