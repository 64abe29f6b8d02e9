from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray, ScalarLike

from .._internal.checks import (
    as_integer,
    check_flag,
    check_number,
    check_value,
    FRACTION,
)
from .._internal.pytree import working_dtype


def _as_axes(axes: Any) -> tuple:
    return tuple(map(as_integer, axes if np.ndim(axes) == 1 else (axes,)))


class VariationalDropout(eqx.Module):
    """Dropout with one mask for a whole solve, shared along some axes.

    An equilibrium exists only if the mask is the same in every evaluation of the cell.
    The mask depends on the key alone, and an equilibrium layer gives its cell the same
    key throughout a solve and its gradient. A cell with several of these layers splits
    the key.

    ```python
    VariationalDropout(0.1, shared_axes=0)       # features, of (time, features)
    VariationalDropout(0.1, shared_axes=(1, 2))  # channels, of (channels, h, w)
    VariationalDropout(0.1, shared_axes=1)       # tokens, of (time, features)
    VariationalDropout(0.1)                      # single entries
    ```

    A step does not draw the mask: XLA moves that out of the loop of a solve. Inference
    drops nothing: see `equinox.nn.inference_mode`.

    Gal and Ghahramani, *A Theoretically Grounded Application of Dropout in Recurrent
    Neural Networks*, 2016. Bai et al., *Deep Equilibrium Models*, 2019, appendix D.

    **Arguments:**

    - `p`: the probability that an entry is dropped. The others are scaled to keep the
        mean.
    - `shared_axes`: the axis or the axes along which all entries share one draw.
    - `inference`: whether nothing is dropped.
    """

    p: ScalarLike
    shared_axes: tuple[int, ...] = eqx.field(
        default=(), static=True, converter=_as_axes
    )
    inference: bool = False

    def __check_init__(self):
        check_number(self, "p", self.p, FRACTION)
        axes = self.shared_axes
        valid = all(type(axis) is int for axis in axes)
        check_value(self, "shared_axes", axes, valid, "an integer or some integers")
        check_flag(self, "inference", self.inference)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """Drop entries of an array.

        **Arguments:**

        - `x`: the array.
        - `key`: the mask is drawn from it. Inference needs none.

        **Returns:**

        The array with zeros instead of the dropped entries.

        **Raises:**

        `ValueError` without a key, unless in inference.
        """
        if self.inference or (isinstance(self.p, int | float) and self.p == 0):
            return x
        if key is None:
            raise ValueError(
                "`VariationalDropout` needs a `key`, unless in inference: see "
                "`equinox.nn.inference_mode`. Give it to the equilibrium layer, and "
                "the cell an argument `key` to pass on."
            )
        keep = 1 - lax.stop_gradient(jnp.asarray(self.p, working_dtype(x)))
        mask = jr.bernoulli(key, keep, self._mask_shape(x))
        return jnp.where(mask, x / keep.astype(x.dtype), 0)

    def _mask_shape(self, x: Array) -> tuple[int, ...]:
        shape = list(x.shape)
        for axis in self.shared_axes:
            shape[axis] = 1
        return tuple(shape)
