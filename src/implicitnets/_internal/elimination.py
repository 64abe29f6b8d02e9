"""Gaussian elimination of the small systems that a solver has in every step.

LAPACK is slower than this for a batch of tiny systems, and does not export.
"""

import functools as ft
from collections.abc import Callable
from typing import TypeAlias

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar


Index: TypeAlias = int | Int[Array, ""]

# Number by number a program grows with the cube of the size, or with its square.
_MOST_ROWS = 10
_MOST_TRIANGULAR_ROWS = 24


def eliminate(
    matrix: Float[Array, " n n"],
    vector: Float[Array, " n"],
    is_usable: Callable[[Index, Scalar], Bool[Array, ""]],
) -> Float[Array, " n"]:
    """Solve a small system, without pivoting.

    **Arguments:**

    - `matrix`, `vector`: the system.
    - `is_usable`: whether the pivot of a row is one. An unknown whose pivot is not is
        zero, and takes no part in the others.

    **Returns:**

    The solution.
    """
    by_row = ft.partial(_row_by_row, is_usable=is_usable)
    if vector.shape[0] > _MOST_ROWS:
        return by_row(matrix, vector)
    # Number by number it is arithmetic over the batch alone, which a GPU runs as one
    # kernel, and not as some for every row. A CPU is as fast by rows, which XLA
    # compiles ten times as fast.
    by_number = ft.partial(_number_by_number, is_usable=is_usable)
    return lax.platform_dependent(matrix, vector, cpu=by_row, default=by_number)


def back_substitute(
    matrix: Float[Array, " n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Solve a small system whose matrix is unit upper triangular.

    **Arguments:**

    - `matrix`: only what is above the diagonal is read.
    - `vector`: the right-hand side.

    **Returns:**

    The solution.
    """
    if vector.shape[0] > _MOST_TRIANGULAR_ROWS:
        return _substitute_by_row(matrix, vector)
    return lax.platform_dependent(
        matrix, vector, cpu=_substitute_by_row, default=_substitute_by_number
    )


def _substitute_by_row(matrix, vector):
    size = vector.shape[0]
    rows = jnp.arange(size)

    def substitute(i, solution):
        j = size - 1 - i
        return jnp.where(rows < j, solution - matrix[:, j] * solution[j], solution)

    return lax.fori_loop(0, size, substitute, vector)


def _substitute_by_number(matrix, vector):
    return _substitute([list(row) for row in matrix], list(vector))


def _substitute(rows, solution):
    for k in reversed(range(len(solution))):
        for i in range(k):
            solution[i] = solution[i] - rows[i][k] * solution[k]
    return jnp.stack(solution)


def _inverse(k, pivot, is_usable):
    usable = is_usable(k, pivot)
    return jnp.where(usable, 1 / jnp.where(usable, pivot, 1), 0)


def _number_by_number(matrix, vector, is_usable):
    size = vector.shape[0]
    rows = [[matrix[i, j] for j in range(size)] + [vector[i]] for i in range(size)]
    for k in range(size):
        inverse = _inverse(k, rows[k][k], is_usable)
        rows[k][k + 1 :] = [x * inverse for x in rows[k][k + 1 :]]
        for i in range(k + 1, size):
            factor = rows[i][k]
            for j in range(k + 1, size + 1):
                rows[i][j] = rows[i][j] - factor * rows[k][j]
    return _substitute(rows, [row[-1] for row in rows])


def _row_by_row(matrix, vector, is_usable):
    index = jnp.arange(vector.shape[0])

    def eliminate(i, system):
        row = system[i] * _inverse(i, system[i, i], is_usable)
        rest = system - system[:, i, None] * row[None, :]
        return jnp.where((index == i)[:, None], row[None, :], rest)

    system = jnp.concatenate([matrix, vector[:, None]], axis=1)
    return lax.fori_loop(0, vector.shape[0], eliminate, system)[:, -1]
