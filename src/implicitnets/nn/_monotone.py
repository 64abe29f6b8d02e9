import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray, Scalar, ScalarLike

from .._internal.checks import (
    as_integer,
    check_flag,
    check_integer,
    check_number,
    check_value,
    POSITIVE,
)
from .._internal.parametrise import AbstractParametrisation, resolve
from .._internal.pytree import working_dtype
from .._linear_solver.gmres import GivensGMRES
from .._linear_solver.solve import linear_operator, run_linear_solver
from .._solver.monotone import AbstractMonotoneCell


class _MonotoneMatrix(AbstractParametrisation):
    """`A^T A - B + B^T`: any matrix with a positive semidefinite symmetric part."""

    a: Float[Array, " d d"]
    b: Float[Array, " d d"]

    def value(self) -> Float[Array, " d d"]:
        dtype = working_dtype(self.a)
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        return (a.T @ a - b + b.T).astype(self.a.dtype)


class _MonotoneKernel(AbstractParametrisation):
    """The kernel of the convolution `A^T A - B + B^T`, of convolutions `A` and `B`."""

    # On a periodic domain this is the composition itself. On a bounded domain with
    # zeros around it, it is the composition on an unbounded one between an embedding
    # and its transpose. So its symmetric part is positive semidefinite on both.
    a: Float[Array, " c c *k"]
    b: Float[Array, " c c *k"]

    def value(self) -> Float[Array, " c c *k2"]:
        dtype = working_dtype(self.a)
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        space = tuple(range(2, a.ndim))
        # The inner products of shifted kernels.
        columns = jnp.swapaxes(a, 0, 1)
        reach = [(size - 1, size - 1) for size in a.shape[2:]]
        product = lax.conv_general_dilated(columns, columns, (1,) * len(space), reach)
        product = jnp.swapaxes(product, 0, 1)
        b_transpose = jnp.flip(jnp.swapaxes(b, 0, 1), space)
        margins = [((size - 1) // 2,) * 2 for size in a.shape[2:]]
        skew = jnp.pad(b - b_transpose, [(0, 0), (0, 0), *margins])
        return (product - skew).astype(self.a.dtype)


class MonotoneCell(AbstractMonotoneCell):
    r"""The dense cell of monotone operator equilibrium networks (monDEQ).

    $$f(z, x) = \operatorname{ReLU}(W z + U x + b), \qquad
    W = (1 - m) I - A^T A + B - B^T.$$

    Every input has exactly one equilibrium, whatever the parameters are, even if plain
    iteration diverges. [`implicitnets.PeacemanRachford`][] and
    [`implicitnets.ForwardBackward`][] always converge to it:

    ```python
    cell = inn.nn.MonotoneCell(784, 100, key=key)
    deq = inn.DeepEquilibriumNetwork(
        cell, inn.PeacemanRachford(1e-3, 1e-6), zero_state=lambda x: jnp.zeros(100)
    )
    ```

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, section 3.

    **Arguments:**

    - `in_size`: the size of the input, a vector.
    - `size`: the size of the state, a vector.
    - `margin`: $m$, positive. A smaller margin lets the cell express more, and its
        solves take more steps. Keyword only argument.
    - `dtype`: the dtype of the parameters; `None` for JAX' default. Keyword only
        argument.
    - `key`: for the initialisation. Keyword only argument.

    **Raises:**

    `ValueError` if the margin or a size is not positive.
    """

    weight: Array | AbstractParametrisation
    injection: eqx.nn.Linear
    margin: ScalarLike

    def __init__(
        self,
        in_size: int,
        size: int,
        *,
        margin: float = 1.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        in_size = check_integer(self, "in_size", in_size, 1)
        size = check_integer(self, "size", size, 1)
        check_number(self, "margin", margin, POSITIVE)
        dtype = jnp.result_type(float) if dtype is None else dtype
        a_key, b_key, injection_key = jr.split(key, 3)
        self.weight = _MonotoneMatrix(
            _uniform(a_key, (size, size), dtype), _uniform(b_key, (size, size), dtype)
        )
        self.injection = eqx.nn.Linear(in_size, size, dtype=dtype, key=injection_key)
        self.margin = margin

    def linear(self, z: Float[Array, " size"]) -> Float[Array, " size"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        return _scale(1 - self.margin, z) - resolve(self.weight) @ z

    def inject(self, x: Float[Array, " in_size"]) -> Float[Array, " size"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        return self.injection(x)

    def proximal(
        self, z: Float[Array, " size"], step_size: ScalarLike
    ) -> Float[Array, " size"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        del step_size
        return jax.nn.relu(z)

    def resolvent(self, z: Float[Array, " size"], step_size: Scalar) -> "_Inverse":
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        del z
        weight = resolve(self.weight).astype(step_size.dtype)
        identity = jnp.eye(weight.shape[0], dtype=weight.dtype)
        matrix = (1 + step_size * self.margin) * identity + step_size * weight
        # Well-conditioned, and no eigenvalue below one: a product costs less than a
        # solve with triangular factors.
        return _Inverse(jnp.linalg.inv(matrix))


class MonotoneConvCell(AbstractMonotoneCell):
    r"""The convolutional cell of monotone operator equilibrium networks (monDEQ).

    As [`implicitnets.nn.MonotoneCell`][], where $A$, $B$ and $U$ are convolutions. Each
    evaluation is one convolution with the composed kernel.

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, sections 3 and
    4.2.

    **Arguments:**

    - `num_spatial_dims`: 1 for sequences, 2 for images.
    - `in_channels`: the channels of the input, an array of `(in_channels, *space)`.
    - `channels`: the channels of the state, of the same spatial shape.
    - `kernel_size`: the kernel size of $A$, $B$ and $U$, odd; an integer, or one for
        each spatial dimension.
    - `periodic`: whether the convolutions of the state wrap around at the edges, as in
        the paper. The fast Fourier transform then solves the linear systems of
        [`implicitnets.PeacemanRachford`][]. If not, there are zeros beyond the edges,
        [`implicitnets.GivensGMRES`][] solves these systems, and
        [`implicitnets.ForwardBackward`][] is often faster. Keyword only argument.
    - `margin`, `dtype`, `key`: as [`implicitnets.nn.MonotoneCell`][]. Keyword only
        arguments.

    **Raises:**

    `ValueError` if the margin or a size is not positive, or a kernel size is not odd.
    """

    weight: Array | AbstractParametrisation
    injection: eqx.nn.Conv
    margin: ScalarLike
    periodic: bool = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        channels: int,
        kernel_size: int | Sequence[int],
        *,
        periodic: bool = True,
        margin: float = 1.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        num_spatial_dims = check_integer(self, "num_spatial_dims", num_spatial_dims, 1)
        in_channels = check_integer(self, "in_channels", in_channels, 1)
        channels = check_integer(self, "channels", channels, 1)
        sizes: Any = kernel_size
        sizes = (sizes,) * num_spatial_dims if np.ndim(sizes) == 0 else sizes
        kernel_size = tuple(map(as_integer, sizes))
        is_odd = all(type(size) is int and size % 2 == 1 for size in kernel_size)
        check_value(
            self,
            "kernel_size",
            kernel_size,
            is_odd and len(kernel_size) == num_spatial_dims and min(kernel_size) > 0,
            f"odd and positive, for each of the {num_spatial_dims} dimensions",
        )
        check_flag(self, "periodic", periodic)
        check_number(self, "margin", margin, POSITIVE)
        dtype = jnp.result_type(float) if dtype is None else dtype
        a_key, b_key, injection_key = jr.split(key, 3)
        shape = (channels, channels, *kernel_size)
        self.weight = _MonotoneKernel(
            _uniform(a_key, shape, dtype), _uniform(b_key, shape, dtype)
        )
        self.injection = eqx.nn.Conv(
            num_spatial_dims,
            in_channels,
            channels,
            kernel_size,
            padding="SAME",
            dtype=dtype,
            key=injection_key,
        )
        self.margin = margin
        self.periodic = periodic

    def linear(self, z: Float[Array, " c *space"]) -> Float[Array, " c *space"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        product = _convolve(resolve(self.weight), z, self.periodic)
        return _scale(1 - self.margin, z) - product

    def inject(self, x: Float[Array, " in_c *space"]) -> Float[Array, " c *space"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        return self.injection(x)

    def proximal(
        self, z: Float[Array, " c *space"], step_size: ScalarLike
    ) -> Float[Array, " c *space"]:
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        del step_size
        return jax.nn.relu(z)

    def resolvent(
        self, z: Float[Array, " c *space"], step_size: Scalar
    ) -> "_PeriodicInverse | _GMRESInverse":
        """As [`implicitnets.nn.AbstractMonotoneCell`][]."""
        weight = resolve(self.weight).astype(step_size.dtype)
        diagonal = 1 + step_size * self.margin
        if not self.periodic:
            return _GMRESInverse(diagonal, step_size * weight)
        symbol = _symbol(step_size * weight, z.shape[1:])
        identity = diagonal * jnp.eye(z.shape[0], dtype=diagonal.dtype)
        matrices = identity.astype(symbol.dtype)[None, :, :] + symbol
        return _PeriodicInverse(jnp.linalg.inv(matrices))


class _Inverse(eqx.Module):
    inverse: Float[Array, " d d"]

    def __call__(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        return (self.inverse @ v.astype(self.inverse.dtype)).astype(v.dtype)


class _PeriodicInverse(eqx.Module):
    # One matrix for each frequency.
    inverses: Complex[Array, " f c c"]

    def __call__(self, v: Float[Array, " c *space"]) -> Float[Array, " c *space"]:
        dtype = working_dtype(v)
        axes = tuple(range(1, v.ndim))
        v_hat = jnp.fft.rfftn(v.astype(dtype), axes=axes)
        flat = v_hat.reshape(v.shape[0], -1)
        flat = jnp.einsum("fij,jf->if", self.inverses, flat)
        out = jnp.fft.irfftn(flat.reshape(v_hat.shape), v.shape[1:], axes)
        return out.astype(v.dtype)


class _GMRESInverse(eqx.Module):
    diagonal: Scalar
    kernel: Float[Array, " c c *k"]

    def __call__(self, v: Float[Array, " c *space"]) -> Float[Array, " c *space"]:
        def product(z):
            return self.diagonal * z + _convolve(self.kernel, z, periodic=False)

        vector = v.astype(working_dtype(v))
        rtol = 100 * float(jnp.finfo(vector.dtype).eps)
        solver = GivensGMRES(rtol, 0.0)

        def solve(product, vector):
            operator = linear_operator(product, vector)
            value, _, _ = run_linear_solver(operator, vector, solver)
            return value

        value = lax.custom_linear_solve(product, vector, solve, solve)
        return value.astype(v.dtype)


def _convolve(
    kernel: Float[Array, " c c *k"], z: Float[Array, " c *space"], periodic: bool
) -> Float[Array, " c *space"]:
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[2:]]
    if periodic:
        z = jnp.pad(z, [(0, 0), *padding], mode="wrap")
        padding = "VALID"
    strides = (1,) * (z.ndim - 1)
    return lax.conv_general_dilated(z[None], kernel, strides, padding)[0]


def _symbol(
    kernel: Float[Array, " c c *k"], space: tuple[int, ...]
) -> Complex[Array, " f c c"]:
    """The matrix of a periodic convolution at every frequency."""
    channels = kernel.shape[:2]
    offsets = [
        (np.arange(size) - (size - 1) // 2) % length
        for size, length in zip(kernel.shape[2:], space, strict=True)
    ]
    grid = jnp.zeros((*channels, *space), kernel.dtype)
    grid = grid.at[(slice(None), slice(None), *np.ix_(*offsets))].add(kernel)
    symbol = jnp.conj(jnp.fft.rfftn(grid, axes=tuple(range(2, grid.ndim))))
    return jnp.moveaxis(symbol.reshape(*channels, -1), -1, 0)


def _scale(factor: ScalarLike, z: Array) -> Array:
    return jnp.asarray(factor, z.dtype) * z


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    limit = 1 / math.sqrt(math.prod(shape[1:]))
    return jr.uniform(key, shape, dtype, -limit, limit)
