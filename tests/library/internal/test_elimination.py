import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from implicitnets._internal.elimination import (
    _number_by_number,
    _row_by_row,
    _substitute_by_number,
    _substitute_by_row,
    back_substitute,
    eliminate,
)

from ..helpers import tolerance


def is_usable(_, pivot):
    return jnp.abs(pivot) > 1e-3


def systems(getkey, size):
    matrix = jr.normal(getkey(), (3, size, size)) + 2 * size * jnp.eye(size)[None]
    return matrix, jr.normal(getkey(), (3, size))


# One size on each side of the bound on what is taken number by number.
@pytest.mark.parametrize("size", [1, 5, 12])
def test_eliminates(getkey, size):
    matrix, vector = systems(getkey, size)
    solution = jax.vmap(lambda a, b: eliminate(a, b, is_usable))(matrix, vector)
    residual = jnp.einsum("bij,bj->bi", matrix, solution) - vector
    assert jnp.max(jnp.abs(residual)) < tolerance(1e-5, 1e-13)


@pytest.mark.parametrize("by", [_number_by_number, _row_by_row])
def test_unknown_without_a_pivot_takes_no_part(getkey, by):
    matrix, vector = systems(getkey, 4)
    matrix, vector = matrix[0], vector[0]
    # The third row is a combination of the first two, and so has no pivot left.
    matrix = matrix.at[2].set(matrix[0] - 2 * matrix[1])
    solution = by(matrix, vector, is_usable)
    others = jnp.array([0, 1, 3])
    expected = jnp.linalg.solve(matrix[jnp.ix_(others, others)], vector[others])
    assert solution[2] == 0
    error = jnp.max(jnp.abs(solution[others] - expected))
    assert error < tolerance(1e-5, 1e-13)


@pytest.mark.parametrize("size", [6, 30])
def test_substitutes_back(getkey, size):
    matrix = jnp.triu(jr.normal(getkey(), (size, size)) / size, 1)
    vector = jr.normal(getkey(), (size,))
    expected = jnp.linalg.solve(matrix + jnp.eye(size), vector)
    for substitute in (back_substitute, _substitute_by_number, _substitute_by_row):
        error = jnp.max(jnp.abs(substitute(matrix, vector) - expected))
        assert error < tolerance(1e-5, 1e-13)
