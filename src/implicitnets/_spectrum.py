import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from ._internal.checks import check_argument
from ._internal.convolution import fast_convolutions
from ._internal.krylov import arnoldi
from ._internal.parametrise import resolve
from ._internal.pytree import working_dtype


def spectral_radius(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]],
    z: PyTree[Array],
    x: Any,
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
) -> Scalar:
    r"""The spectral radius of a cell's Jacobian with respect to the state.

    At an equilibrium it decides how fast plain iteration converges near it, by this
    factor a step, and whether it converges at all, which it does below one.

    The largest eigenvalue of the projection of the Jacobian on a Krylov space, by
    Arnoldi's method, so that a complex pair of eigenvalues, whose vectors turn for
    ever under power iteration, is found as well as a real one. The projection's own
    radius is the limit of $\lVert H^k \rVert^{1/k}$, by repeated squaring: arithmetic
    only, where general eigenvalue solvers exist on few platforms.

    Works under `jit` and `vmap`: one example's state and input in, one number out. Its
    cost is `num_steps` Jacobian products, its memory as many states. Has no gradient:
    penalise [`implicitnets.jacobian_penalty`][] instead.

    **Arguments:**

    - `cell`: `cell(z, x) -> z`.
    - `z`: where; an equilibrium, for the meaning above.
    - `x`: the cell's second argument.
    - `key`: for the random start of the Krylov space. Keyword only argument.
    - `num_steps`: the dimension of the Krylov space, and so the number of products. An
        estimate from below on most matrices. Keyword only argument.

    **Returns:**

    A scalar.

    **Raises:**

    `ValueError` if `num_steps` is not positive.
    """
    check_argument("num_steps", num_steps, num_steps >= 1, "at least 1")
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

    At least [`implicitnets.spectral_radius`][], and below one everywhere only if the
    cell is a contraction in the two-norm. By Lanczos' method on the product of the
    Jacobian with its transpose; otherwise as `spectral_radius`.

    **Arguments:**

    - `cell`, `z`, `x`, `key`: as [`implicitnets.spectral_radius`][].
    - `num_steps`: the dimension of the Krylov space, at two products each. An estimate
        from below. Keyword only argument.

    **Returns:**

    A scalar.

    **Raises:**

    `ValueError` if `num_steps` is not positive.
    """
    check_argument("num_steps", num_steps, num_steps >= 1, "at least 1")
    product = _jacobian(cell, z, x)
    transpose = jax.linear_transpose(product, z)

    def normal_product(v):
        return transpose(product(v))[0]

    return jnp.sqrt(_ritz_radius(normal_product, z, key, num_steps))


def _jacobian(cell, z, x):
    cell = fast_convolutions(resolve(cell))
    return jax.linearize(lambda z: cell(z, x), z)[1]


def _ritz_radius(product, z, key, num_steps):
    flat, unravel = ravel_pytree(z)
    dtype = working_dtype(flat)

    def flat_product(v):
        image, _ = ravel_pytree(product(unravel(v.astype(flat.dtype))))
        return image.astype(dtype)

    start = jr.normal(key, flat.shape, dtype)
    _, projection = arnoldi(flat_product, start, num_steps)
    return lax.stop_gradient(_radius(projection))


# The power 2**24 makes of the constant in `norm(H^k) <= C rho^k`, below 1e6 for any
# matrix of interest, a factor of 1 + 1e-6.
_NUM_SQUARINGS = 24


def _radius(matrix: Float[Array, "n n"]) -> Scalar:
    """The spectral radius of a small matrix, by Gelfand's formula."""
    multiply = ft.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def scaled(power):
        norm = jnp.sqrt(jnp.sum(jnp.square(power)))
        positive = norm > 0
        log_norm = jnp.where(positive, jnp.log(jnp.where(positive, norm, 1)), -jnp.inf)
        return power / jnp.where(positive, norm, 1), log_norm

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
