"""An inverse Jacobian made of rank-one updates, in compact representation.

Byrd, Nocedal and Schnabel, *Representations of Quasi-Newton Matrices and Their Use in
Limited Memory Methods*, 1994.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._internal.elimination import eliminate
from .._internal.history import (
    history_combine,
    history_dot,
    history_get,
    history_set,
)


# Below this a pivot, relative to the lengths of its step and residual change, is zero.
_MIN_PIVOT = 1e-3


class Secant(eqx.Module):
    """A step `s`, the change `y` of the residual over it, and the update they make.

    **Attributes:**

    - `step`, `change`: `s` and `y`.
    - `step_scale`, `change_scale`: one over their lengths.
    - `usable`: whether there is an update.
    - `good`: whether it is Broyden's good update.
    """

    step: PyTree[Array]
    change: PyTree[Array]
    step_scale: Scalar
    change_scale: Scalar
    usable: Bool[Array, ""]
    good: Bool[Array, ""]


class Updates(eqx.Module):
    """The updates that an inverse Jacobian is made of: `-I + W^T A^-1 Q`.

    Every update has a row `(s + y) / |y|` in `W`, and in `Q` a row `y / |y|` (bad
    update) or `s / |s|` (good update). With the rows `y / |y|` of `Y`, the matrix `A`
    is `Q Y^T` on and above the diagonal, in the order of the updates. Below the
    diagonal it is zero in the row of a bad update, and `Q W^T` in the row of a good
    one.

    **Attributes:**

    - `q`, `w`: ring buffers.
    - `matrix`: `A`, its rows and columns in the order of the buffers. So an update
        changes one of each, and nothing moves.
    """

    q: PyTree[Array]
    w: PyTree[Array]
    matrix: Float[Array, " history history"]

    def remember(
        self, secant: Secant, slot: Int[Array, ""], frozen: Bool[Array, ""]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The histories with the rows of a secant; as they are where `frozen`."""

        def make_q(s, y):
            return jnp.where(
                secant.good, secant.step_scale * s, secant.change_scale * y
            )

        def make_w(s, y):
            return secant.change_scale * (s + y)

        def write(history, make):
            # A frozen row is written again. That costs next to nothing, where a select
            # of the whole history would cost more than the step. What is not usable
            # is stored as zeros, which take no part in anything, so that the slot
            # stays the same for a whole batch.
            old = history_get(history, slot, secant.change)
            new = jtu.tree_map(make, secant.step, secant.change)
            row = jtu.tree_map(
                lambda n, o: jnp.where(frozen, o, jnp.where(secant.usable, n, 0)),
                new,
                old,
            )
            return history_set(history, slot, row)

        return write(self.q, make_q), write(self.w, make_w)

    def inverse(self, num_updates: Int[Array, ""]) -> "InverseJacobian":
        """The inverse Jacobian after this many updates, those dropped included."""
        size = self.matrix.shape[0]
        identity = jnp.eye(size, dtype=self.matrix.dtype)
        oldest = num_updates % size
        matrix = _roll(self.matrix, -oldest)
        core = jax.vmap(_eliminate, in_axes=(None, 1), out_axes=1)(matrix, identity)
        core = _roll(core, oldest)
        finite = jnp.all(jnp.isfinite(self.matrix)) & jnp.all(jnp.isfinite(core))
        core = jnp.where(finite, core, 0)
        return InverseJacobian(q=self.q, w=self.w, core=core, finite=finite)


class InverseJacobian(eqx.Module):
    """The estimate of an inverse Jacobian that a solve ends with, `-I + W^T C Q`.

    **Attributes:**

    - `q`, `w`: histories.
    - `core`: the matrix between them.
    - `finite`: whether there is such a matrix. One that was not finite is replaced by
        zero, which leaves `-I`.
    """

    q: PyTree[Array]
    w: PyTree[Array]
    core: Float[Array, " history history"]
    finite: Bool[Array, ""]

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """The product with a vector, of the structure and dtypes of that."""
        weights = matvec(self.core, history_dot(self.q, vector))
        correction = history_combine(weights, self.w, vector)
        return jtu.tree_map(
            lambda x, c: (c - x.astype(c.dtype)).astype(x.dtype), vector, correction
        )

    def transpose(self) -> "InverseJacobian":
        """The transpose, at no cost."""
        return InverseJacobian(q=self.w, w=self.q, core=self.core.T, finite=self.finite)


def replace(
    matrix: Float[Array, " n n"],
    newest: Bool[Array, " n"],
    row: Float[Array, " n"],
    column: Float[Array, " n"],
) -> Float[Array, " n n"]:
    """Replace the row and the column of the oldest update, `column` with the corner."""
    matrix = jnp.where(newest[:, None], row[None, :], matrix)
    return jnp.where(newest[None, :], column[:, None], matrix)


def replace_in_inverse(
    inverse: Float[Array, " n n"],
    newest: Bool[Array, " n"],
    column: Float[Array, " n"],
    usable: Bool[Array, ""],
) -> Float[Array, " n n"]:
    """The inverse of a matrix after `replace`, if that is unit upper triangular."""
    # What is left of the inverse when the oldest update is dropped is the inverse of
    # what is left of the matrix. So the inverse is never computed from scratch.
    zeros = jnp.zeros_like(column)
    inverse_column = -matvec(replace(inverse, newest, zeros, zeros), column)
    inverse_column = jnp.where(newest, jnp.where(usable, 1, 0), inverse_column)
    return replace(inverse, newest, zeros, inverse_column)


def matvec(
    matrix: Float[Array, " n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    # Multiply and sum, which XLA fuses with what is around it: on CPU a step of a batch
    # takes as long with `dot` for a matrix as small as this. The long rows of a history
    # are another matter, see `history_dot`.
    return jnp.sum(matrix * vector[None, :], axis=1)


def solve(
    matrix: Float[Array, " n n"], vector: Float[Array, " n"], oldest: Int[Array, ""]
) -> Float[Array, " n"]:
    """Elimination in the order of the updates, of which the oldest is in this row."""
    solution = _eliminate(_roll(matrix, -oldest), jnp.roll(vector, -oldest))
    return jnp.roll(solution, oldest)


def _roll(matrix, shift):
    return jnp.roll(jnp.roll(matrix, shift, axis=0), shift, axis=1)


def _eliminate(matrix, vector):
    # A pivot is the denominator of an update, given the updates before it. Where it
    # vanishes the update would make the Jacobian singular, and is left out.
    return eliminate(matrix, vector, lambda _, pivot: jnp.abs(pivot) > _MIN_PIVOT)
