"""The layers that the models share."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from ..nn import initialise


_Tree = TypeVar("_Tree")

# A cell with small weights is a contraction at first, so that there is an equilibrium
# and it is easy to find.
_SMALL = jax.nn.initializers.normal(0.01)

RELU = eqx.nn.Lambda(jax.nn.relu)


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    use_bias: bool = False,
    key: PRNGKeyArray,
) -> eqx.nn.Conv2d:
    """A convolution that keeps the size of an image, but for its stride."""
    return eqx.nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        use_bias=use_bias,
        key=key,
    )


def batch_norm(channels: int, affine: bool = True) -> eqx.nn.BatchNorm:
    return eqx.nn.BatchNorm(
        channels,
        axis_name="batch",
        channelwise_affine=affine,
        momentum=0.9,
        mode="batch",
    )


def linear(
    in_size: int, out_size: int, *, use_bias: bool = False, key: PRNGKeyArray
) -> eqx.nn.Linear:
    """A linear layer with small normal weights, and biases of zero."""
    layer = eqx.nn.Linear(in_size, out_size, use_bias, key=key)
    return initialise(layer, _SMALL, key=key)


def draw_convolutions(tree: _Tree, *, key: PRNGKeyArray) -> _Tree:
    """The pytree with small normal weights and biases in all its convolutions."""

    def is_conv(node):
        return isinstance(node, eqx.nn.Conv2d)

    convs, others = eqx.partition(tree, jtu.tree_map(is_conv, tree, is_leaf=is_conv))
    # One draw for all of them, as every shape would be compiled on its own.
    weights, unravel = ravel_pytree(convs)
    return eqx.combine(unravel(_SMALL(key, weights.shape, weights.dtype)), others)
