from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from .manual import vary_like
from .pytree import working_dtype


_EXACT = lax.Precision.HIGHEST

# `2**16` steps of power iteration on the projection, more than rounding lets through.
_NUM_SQUARINGS = 16


def arnoldi(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    start: Float[Array, " n"],
    num_steps: int,
) -> tuple[Float[Array, "steps n"], Float[Array, "steps steps"]]:
    """An orthonormal basis of a vector's Krylov space, and the map's matrix in it."""
    # Both have zeros where the space is exhausted early.
    num_steps = min(num_steps, start.size)
    dtype = start.dtype
    negligible = 100 * jnp.finfo(dtype).eps

    def step(k, carry):
        basis, projection = carry
        image = product(basis[k])
        least = negligible * jnp.sqrt(jnp.sum(jnp.square(image)))
        column = jnp.zeros(num_steps + 1, dtype)
        # Twice, so that the basis is orthogonal to rounding.
        for _ in range(2):
            parts = jnp.matmul(basis, image, precision=_EXACT)
            image = image - jnp.matmul(parts, basis, precision=_EXACT)
            column = column + parts
        image, norm = _normalise(image, least)
        column = column.at[k + 1].set(norm)
        return basis.at[k + 1].set(image), projection.at[:, k].set(column)

    first, _ = _normalise(start, jnp.zeros((), dtype))
    basis = jnp.zeros((num_steps + 1, start.size), dtype).at[0].set(first)
    projection = vary_like(jnp.zeros((num_steps + 1, num_steps), dtype), start)
    basis, projection = lax.fori_loop(0, num_steps, step, (basis, projection))
    return basis[:num_steps], projection[:num_steps]


def leading_eigenvector(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    start: Float[Array, " n"],
    num_steps: int,
) -> Float[Array, " n"]:
    """A unit eigenvector for a semidefinite matrix's largest eigenvalue, or zero."""
    # For a symmetric map Arnoldi's method is Lanczos', whose error falls with the
    # square of the number of steps; that of power iteration falls with the number. The
    # small eigenproblem is solved by repeated squaring: arithmetic, which exports. The
    # result is not to be differentiated.
    dtype = start.dtype
    basis, projection = arnoldi(product, start, num_steps)
    power = projection + projection.T

    def square(_, power):
        power, _ = _normalise(power, jnp.zeros((), dtype))
        return jnp.matmul(power, power, precision=_EXACT)

    power = lax.fori_loop(0, _NUM_SQUARINGS, square, power)
    parts = power[jnp.argmax(jnp.diagonal(power))]
    vector = jnp.matmul(parts, basis, precision=_EXACT)
    return _normalise(vector, jnp.zeros((), dtype))[0]


def starting_vector(example: Array) -> Float[Array, " n"]:
    """A fixed vector without structure, in which no eigenvector is missing."""
    start = jr.normal(jr.key(0), (example.size,), working_dtype(example))
    return vary_like(start, example)


def _normalise(x, least):
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    # Also where it is NaN, which is to be seen and not to be taken for zero.
    usable = ~(norm <= least)
    factor = jnp.where(usable, 1 / jnp.where(usable, norm, 1), 0)
    return factor * x, jnp.where(usable, norm, 0)
