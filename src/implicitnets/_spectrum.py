import functools as ft
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from ._internal.checks import check_integer
from ._internal.convolution import fast_convolutions
from ._internal.krylov import arnoldi
from ._internal.manual import vary_like
from ._internal.parametrise import resolve
from ._internal.pytree import working_dtype


_Linear: TypeAlias = Callable[[PyTree[Array]], PyTree[Array]]


def spectral_radius(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]],
    z: PyTree[Array],
    x: Any,
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
) -> Scalar:
    r"""The spectral radius of a cell's Jacobian with respect to the state.

    At an equilibrium, plain iteration converges near it if the radius is below one, by
    the factor of the radius in each step.

    Arnoldi's method projects the Jacobian on a Krylov space, and the result is the
    radius of the projection. It finds a complex pair of eigenvalues as well as a real
    one, where power iteration would rotate for ever. The radius of the projection is
    the limit of $\lVert H^k \rVert^{1/k}$, computed by repeated squaring, because
    general eigenvalue solvers exist on few platforms.

    Works under `jit` and `vmap`: one example's state and input in, one number out. It
    costs `num_steps` Jacobian products and stores as many states. It has no gradient:
    [`implicitnets.jacobian_penalty`][] is the penalty to train with.

    **Arguments:**

    - `cell`: `cell(z, x) -> z`.
    - `z`: the state at which to take the Jacobian, usually an equilibrium.
    - `x`: the cell's second argument.
    - `key`: for the random start of the Krylov space. Keyword only argument.
    - `num_steps`: the dimension of the Krylov space, and so the number of products.
        With few steps most estimates are too low. Keyword only argument.

    **Returns:**

    A scalar.

    **Raises:**

    `ValueError` if `num_steps` is not positive.
    """
    num_steps = check_integer("spectral_radius", "num_steps", num_steps, 1)
    product = _jacobian(cell, z, x)
    return _ritz_radius(product, z, key, num_steps)


def operator_norm(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]],
    z: PyTree[Array],
    x: Any,
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
) -> Scalar:
    """The largest singular value of a cell's Jacobian with respect to the state.

    It is at least the [`implicitnets.spectral_radius`][]. A cell is a contraction in
    the two-norm if it is below one everywhere. Lanczos' method finds it, on the product
    of the Jacobian with its transpose; everything else is as in `spectral_radius`.

    **Arguments:**

    - `cell`, `z`, `x`, `key`: as [`implicitnets.spectral_radius`][].
    - `num_steps`: the dimension of the Krylov space, at two products each. With few
        steps the estimate is too low. Keyword only argument.

    **Returns:**

    A scalar.

    **Raises:**

    `ValueError` if `num_steps` is not positive.
    """
    num_steps = check_integer("operator_norm", "num_steps", num_steps, 1)
    product = _jacobian(cell, z, x)
    transpose = jax.linear_transpose(product, z)

    def normal_product(v):
        return transpose(product(v))[0]

    return jnp.sqrt(_ritz_radius(normal_product, z, key, num_steps))


def _jacobian(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]], z: PyTree[Array], x: Any
) -> _Linear:
    cell = fast_convolutions(resolve(cell))
    return jax.linearize(lambda z: cell(z, x), z)[1]


def _ritz_radius(
    product: _Linear, z: PyTree[Array], key: PRNGKeyArray, num_steps: int
) -> Scalar:
    flat, unravel = ravel_pytree(z)
    dtype = working_dtype(flat)

    def flat_product(v):
        image, _ = ravel_pytree(product(unravel(v.astype(flat.dtype))))
        return image.astype(dtype)

    start = vary_like(jr.normal(key, flat.shape, dtype), flat)
    _, projection = arnoldi(flat_product, start, num_steps)
    return lax.stop_gradient(_radius(projection))


# The constant in `norm(H^k) <= C rho^k` is below 1e6 for any matrix of interest. The
# power 2**24 leaves a factor of 1 + 1e-6 of it.
_NUM_SQUARINGS = 24


def _radius(matrix: Float[Array, "n n"]) -> Scalar:
    """The spectral radius of a small matrix, by Gelfand's formula."""
    multiply = ft.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def scaled(power):
        norm = jnp.sqrt(jnp.sum(jnp.square(power)))
        # NaN is no zero: it goes through.
        zero = norm == 0
        log_norm = jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, norm)))
        return power / jnp.where(zero, 1, norm), log_norm

    def square(_, carry):
        power, log_norm, exponent = carry
        power, log_scale = scaled(multiply(power, power))
        # norm(H^(2k))^(1/2k) from norm(H^k)^(1/k) and the scale that was taken out.
        exponent = 2 * exponent
        return power, log_norm + log_scale / exponent, exponent

    power, log_norm = scaled(matrix)
    one = jnp.ones((), matrix.dtype)
    _, log_norm, _ = lax.fori_loop(0, _NUM_SQUARINGS, square, (power, log_norm, one))
    return jnp.exp(log_norm)
