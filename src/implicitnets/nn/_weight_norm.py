from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.parametrise import (
    AbstractParametrisation,
    Filter,
    parametrise,
    resolve,
)
from .._internal.pytree import working_dtype


_Cell = TypeVar("_Cell")

LINEAR_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)


class WeightNorm(AbstractParametrisation):
    r"""Weight normalisation: a weight as the length and the direction of its rows.

    $w = g \, v / \lVert v \rVert$ with the norm over all axes but the first, that of
    the outputs. The value of the weight is at first what it was. A row of zeros gets
    the direction of a row of ones, so that training can move it away from zero.

    Salimans and Kingma, *Weight Normalization*, 2016.

    **Arguments:**

    - `weight`: the first value of the weight, an array or another parametrisation.

    **Attributes:**

    - `length`: $g$, in at least single precision.
    - `direction`: $v$.
    """

    length: Array
    direction: Array | AbstractParametrisation

    def __init__(self, weight: Array | AbstractParametrisation):
        length = _row_norms(resolve(weight))
        if not isinstance(weight, AbstractParametrisation):
            weight = jnp.where(length == 0, jnp.ones_like(weight), weight)
        self.length = length
        self.direction = weight

    def value(self) -> Array:
        """As [`implicitnets.nn.AbstractParametrisation`][]."""
        direction = resolve(self.direction)
        norms = _row_norms(direction)
        factors = self.length.astype(norms.dtype) / jnp.where(norms == 0, 1, norms)
        return (factors * direction.astype(norms.dtype)).astype(direction.dtype)


def _row_norms(weight: Array) -> Array:
    axes = tuple(range(1, weight.ndim))
    squares = jnp.square(weight.astype(working_dtype(weight)))
    squares = jnp.sum(squares, axis=axes, keepdims=True)
    # The square root has no derivative at zero.
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def weight_norm(cell: _Cell, filter: Filter = LINEAR_LAYERS) -> _Cell:
    """Weight normalisation in every chosen layer of a cell.

    [`implicitnets.nn.WeightNorm`][] says what happens to a weight, and
    [`implicitnets.nn.resolve`][] says when.

    ```python
    cell = inn.nn.weight_norm(cell)
    cell = inn.nn.weight_norm(cell, filter=eqx.nn.Linear)
    cell = inn.nn.weight_norm(cell, filter=lambda path, _: path.startswith("block"))
    cell = eqx.tree_at(lambda c: c.matrix, cell, replace_fn=inn.nn.WeightNorm)
    ```

    **Arguments:**

    - `cell`: any pytree.
    - `filter`: which layers to choose among those with a `weight` of at least two
        dimensions. It is a type or a tuple of types, by default Equinox' linear and
        convolutional layers; or a function of a layer's path, such as
        `"block.layers.0"`, and the layer.

    **Returns:**

    The cell, with another parametrisation of the same weights.

    **Raises:**

    `ValueError` if the filter chooses no layer.
    """
    return parametrise(cell, filter, lambda layer: WeightNorm(layer.weight))
