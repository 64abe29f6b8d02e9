import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from ._convolution import fast_convolutions
from ._history import (
    empty_history,
    history_combine,
    history_dot,
    history_get,
    history_set,
)
from ._misc import check_argument, tree_astype, tree_dot, tree_normal, working_dtype


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
    _, product = jax.linearize(lambda z: fast_convolutions(cell)(z, x), z)
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
    _, product = jax.linearize(lambda z: fast_convolutions(cell)(z, x), z)
    transpose = jax.linear_transpose(product, z)

    def normal_product(v):
        return transpose(product(v))[0]

    return jnp.sqrt(_ritz_radius(normal_product, z, key, num_steps))


def _ritz_radius(product, z, key, num_steps):
    product = _in_working_dtype(product, z)
    size = sum(leaf.size for leaf in jtu.tree_leaves(z))
    start = tree_normal(key, tree_astype(z, working_dtype(z)))
    hessenberg = _arnoldi(product, start, min(num_steps, size))
    return lax.stop_gradient(_radius(hessenberg)).astype(working_dtype(z))


def _in_working_dtype(product, z):
    dtype = working_dtype(z)
    dtypes = jtu.tree_map(lambda leaf: leaf.dtype, z)

    def narrowed(v):
        v = jtu.tree_map(lambda leaf, dtype: leaf.astype(dtype), v, dtypes)
        return tree_astype(product(v), dtype)

    return narrowed


def _arnoldi(
    product: Callable[[PyTree[Array]], PyTree[Array]],
    start: PyTree[Array],
    num_steps: int,
) -> Float[Array, "steps steps"]:
    """The projection of a linear map on the Krylov space of a vector.

    **Arguments:**

    - `product`: the linear map.
    - `start`: the vector; of the working dtype.
    - `num_steps`: the dimension of the space.

    **Returns:**

    The map's matrix in an orthonormal basis of the space; where that is exhausted
    early, zeros.
    """
    dtype = working_dtype(start)
    negligible = 100 * jnp.finfo(dtype).eps

    def normalised(v, least):
        norm = jnp.sqrt(tree_dot(v, v))
        usable = norm > least
        factor = jnp.where(usable, 1 / jnp.where(usable, norm, 1), 0)
        return jtu.tree_map(lambda leaf: leaf * factor, v), norm * factor * norm

    def step(k, carry):
        basis, hessenberg = carry
        image = product(history_get(basis, k, start))
        least = negligible * jnp.sqrt(tree_dot(image, image))
        column = jnp.zeros(num_steps + 1, dtype)
        # Twice, so that the basis is orthogonal to rounding.
        for _ in range(2):
            parts = history_dot(basis, image)
            image = jtu.tree_map(
                jnp.subtract, image, history_combine(parts, basis, start)
            )
            column = column + parts
        image, norm = normalised(image, least)
        basis = history_set(basis, k + 1, image)
        return basis, hessenberg.at[:, k].set(column.at[k + 1].set(norm))

    first, _ = normalised(start, jnp.zeros((), dtype))
    basis = history_set(empty_history(num_steps + 1, start), 0, first)
    hessenberg = jnp.zeros((num_steps + 1, num_steps), dtype)
    _, hessenberg = lax.fori_loop(0, num_steps, step, (basis, hessenberg))
    return hessenberg[:num_steps]


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
