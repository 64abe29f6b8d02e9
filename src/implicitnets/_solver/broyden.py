from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_hyperparameter,
    check_integer,
    check_options,
    check_tolerances,
)
from .._internal.history import (
    empty_history,
    history_combine,
    history_dot,
    history_get,
    history_set,
)
from .._internal.loop import Unfrozen
from .._internal.pytree import tree_dot, working_dtype
from .progress import Progress, start_progress


# With only bad updates, iterates on an expansive map often come to rest where there is
# no root, and good ones get them out. Sooner than this costs contractions evaluations.
_STALLED_BEFORE_GOOD = 10

# Residuals of quasi-Newton methods are not monotone: a line search that asks for a
# decrease fails where none at all does not. This one is for steps that go astray.
_MAX_GROWTH = 3.0
_BACKTRACK = 0.25
_MAX_BACKTRACKS = 10

# Below this a pivot, relative to the lengths of its step and residual change, is zero.
_MIN_PIVOT = 1e-3


class _Memory(eqx.Module):
    """What the next step needs to know of the ones before it.

    `base` is the last iterate that was not rejected and `residual` the residual there,
    from which a rejected step starts again.

    For every remembered step `s`, over which the residual changed by `y`, `W` has the
    row `(s + y) / |y|` and `Q` the row `y / |y|` (bad update) or `s / |s|` (good one).
    The inverse Jacobian is `-I + W^T A^-1 Q`, where `A` is `Q Y^T` on and above the
    diagonal, `Y` having the rows `y / |y|`, and below it zero in the row of a bad
    update and that of `Q W^T` in the row of a good one.

    `q` and `w` are ring buffers. Everything else is in the order of the updates. These
    two and the matrix stay as they are for an example that has finished, so that the
    inverse can be used after the solve; the rest is free to change.
    """

    base: PyTree[Array]
    residual: PyTree[Array]
    residual_norm: Scalar
    projections: Float[Array, " history"]
    q: PyTree[Array]
    w: PyTree[Array]
    matrix: Float[Array, " history history"]
    inverse: Float[Array, " history history"]
    is_good: Bool[Array, " history"]
    num_stalled: Int[Array, ""]
    num_backtracks: Int[Array, ""]


class BroydenState(eqx.Module):
    """The state of a [`Broyden`][] solve."""

    progress: Progress
    num_rejected_steps: Int[Array, ""]
    num_steps: Unfrozen[Int[Array, ""]]
    memory: Unfrozen[_Memory]


def _shift(values, newest):
    """Drop the oldest entry and append one."""
    return jnp.concatenate([values[1:], newest[None]])


def _border(matrix, row, column):
    """Drop the oldest row and column and append new ones, `column` with the corner."""
    matrix = jnp.concatenate([matrix[1:, 1:], row[None, :-1]])
    return jnp.concatenate([matrix, column[:, None]], axis=1)


def _matvec(matrix, vector):
    # Multiply and sum, not `dot`: see `history_dot`.
    return jnp.sum(matrix * vector[None, :], axis=1)


def _solve(
    matrix: Float[Array, " n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Gauss-Jordan elimination in the order of the updates.

    A pivot is the denominator of an update, given the updates before it. Where it
    vanishes the update would make the Jacobian singular, and is left out.
    """
    size = vector.shape[0]
    index = jnp.arange(size)

    def eliminate(i, system):
        pivot = system[i, i]
        usable = jnp.abs(pivot) > _MIN_PIVOT
        row = jnp.where(usable, system[i] / jnp.where(usable, pivot, 1), 0)
        rest = system - system[:, i, None] * row[None, :]
        return jnp.where((index == i)[:, None], row[None, :], rest)

    system = jnp.concatenate([matrix, vector[:, None]], axis=1)
    return jax.lax.fori_loop(0, size, eliminate, system)[:, -1]


class InverseJacobian(eqx.Module):
    """The estimate of an inverse Jacobian that a solve ends with, `-I + W^T C Q`.

    **Attributes:**

    - `q`, `w`: histories.
    - `core`: the matrix between them.
    - `finite`: whether there is such a matrix: one that was not finite is replaced by
        zero, which leaves `-I`.
    """

    q: PyTree[Array]
    w: PyTree[Array]
    core: Float[Array, " history history"]
    finite: Bool[Array, ""]

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """The product with a vector.

        **Arguments:**

        - `vector`: of the structure of the state.

        **Returns:**

        The product, of the structure and dtypes of `vector`.
        """
        weights = _matvec(self.core, history_dot(self.q, vector))
        correction = history_combine(weights, self.w, vector)
        return jtu.tree_map(
            lambda x, c: (c - x.astype(c.dtype)).astype(x.dtype), vector, correction
        )

    def transpose(self) -> "InverseJacobian":
        """The transpose, at no cost.

        **Returns:**

        The transpose.
        """
        return InverseJacobian(q=self.w, w=self.q, core=self.core.T, finite=self.finite)


def inverse_jacobian(state: BroydenState) -> InverseJacobian:
    """What a Broyden solve has learned of the inverse Jacobian.

    **Arguments:**

    - `state`: the state at any point of the solve.

    **Returns:**

    The inverse Jacobian that its next step would use.
    """
    memory = state.memory.value
    size = memory.matrix.shape[0]
    identity = jnp.eye(size, dtype=memory.matrix.dtype)
    core = jax.vmap(_solve, in_axes=(None, 1), out_axes=1)(memory.matrix, identity)
    finite = jnp.all(jnp.isfinite(memory.matrix)) & jnp.all(jnp.isfinite(core))
    core = jnp.where(finite, core, 0)
    # From the order of the updates to that of the ring buffers. Not by `num_steps`,
    # which goes on counting after an example has finished.
    shift = (state.progress.num_evaluations - 1) % size
    core = jnp.roll(jnp.roll(core, shift, axis=0), shift, axis=1)
    return InverseJacobian(q=memory.q, w=memory.w, core=core, finite=finite)


def _shapes(tree):
    return jtu.tree_map(lambda x: x.shape, tree)


class Broyden(optx.AbstractRootFinder):
    """Broyden's quasi-Newton method with a limited memory.

    One evaluation a step and no derivatives. The inverse Jacobian starts from the `-I`
    that is that of `F(z) = f(z) - z` where `f` is constant, so that the first step is
    the fixed-point iteration's, and has a rank-one update for each of the last
    `history_size` steps. When the oldest step is dropped all updates are made afresh
    from `-I`, which in a compact representation takes no more than the two passes over
    the history that any step takes. (To overwrite the oldest rank-one term, as is often
    done, truncates nothing, since the others were made relative to it, and diverges.)

    Stops when `norm(F(z)) <= atol + rtol * norm(F(z) + z)`, which for the root
    `F(z) = f(z) - z` of a fixed-point problem is the rule of
    [`implicitnets.AndersonAcceleration`][]. Checked on an iterate that was evaluated,
    and the best one is returned. A solve ends as unsuccessful with the result
    `nonfinite`, `nonlinear_divergence` (the residual norm exceeds 1000 times the
    largest of the first residual norm, the first `norm(F(z) + z)` and the two-norm of a
    state of ones) or `stagnation` (`patience` evaluations without a new best iterate).

    Broyden's good update is the least change of the Jacobian that agrees with a step,
    his bad update the least change of the inverse. Evaluations, means over 12 maps of
    a kind, with 3 and with 10 steps remembered (in brackets how many were not solved):

    | map | good | bad | default |
    |---|---|---|---|
    | linear, symmetric, spectral radius 0.99 | 87, 62 | 54, 33 | 54, 33 |
    | linear, nonsymmetric, spectral radius 0.99 | 213 (1), 120 | 243, 90 | 200, 108 |
    | `tanh`, nonsymmetric, spectral radius 0.99 | 86, 74 | 76, 66 | 76, 66 |
    | linear, small but for eigenvalues -1 to -5 | 40, 20 | 119, 32 | 39, 20 |
    | `tanh`, small but for eigenvalues -1 to -5 | 32, 18 | 62, 26 | 32, 17 |
    | `tanh`, trained | 41, 29 | 53, 30 | 53, 30 |
    | `tanh`, symmetric, spectral radius 2 | 118, 92 | (5), (10) | 213 (3), 243 (2) |

    So by default a step gets a good update if it proves the map expansive (the residual
    changed by more than twice the step's length) or if ten evaluations have brought no
    new best iterate, and a bad one otherwise. The good update's third pass over the
    history and its elimination are run only if some example of a batch needs them.

    The statistics have `nfe`, the number of evaluations, and `num_rejected_steps`, how
    many of them the line search rejected.

    Broyden, *A Class of Methods for Solving Nonlinear Simultaneous Equations*, 1965,
    for both updates; Martínez, *Practical Quasi-Newton Methods for Solving Nonlinear
    Systems*, 2000, for choosing between them at every step; Byrd, Nocedal and Schnabel,
    *Representations of Quasi-Newton Matrices and Their Use in Limited Memory Methods*,
    1994, for the compact representation.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule and of the line search.
    - `history_size`: how many steps are remembered, at two states of memory each. A
        strongly expansive map may need all of them, so `max_steps`.
    - `good_update`: `True` for good updates only, `False` for bad ones only, `None` for
        the choice above. Good ones are the more robust on strongly expansive maps.
    - `line_search`: whether to reject a step that more than triples the residual norm,
        or leads to where the function is not finite, and to try a quarter of it, at
        most ten times in a row. Each trial is a step with its evaluation. It hardly
        ever acts on a contraction, and saves most solves that start too far away.
    - `patience`: after how many evaluations without a new best iterate to give up.
        Linear maps of spectral radius 0.99 went less than 30 without one if symmetric,
        less than 150 if not.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    history_size: int = 10
    good_update: bool | None = None
    line_search: bool = True
    patience: int = 150

    def __check_init__(self):
        check_tolerances(self)
        check_integer(self, "history_size", 1)
        check_integer(self, "patience", 1)
        valid = self.good_update is None or isinstance(self.good_update, bool)
        check_hyperparameter(self, "good_update", valid, "True, False or None")
        valid = isinstance(self.line_search, bool)
        check_hyperparameter(self, "line_search", valid, "True or False")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, aux_struct, tags
        check_options(self, options)
        if _shapes(f_struct) != _shapes(y):
            raise ValueError(
                "`Broyden` is for functions whose value has the structure and shapes "
                f"of their argument; got {f_struct} for {jax.eval_shape(lambda: y)}."
            )
        m = self.history_size
        dtype = working_dtype(y)
        zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, dtype), y)
        empty = empty_history(m, y, dtype)
        memory = _Memory(
            base=zeros,
            residual=zeros,
            residual_norm=jnp.array(jnp.inf, dtype),
            projections=jnp.zeros(m, dtype),
            q=empty,
            w=empty,
            matrix=jnp.zeros((m, m), dtype),
            inverse=jnp.zeros((m, m), dtype),
            is_good=jnp.zeros(m, bool),
            num_stalled=jnp.array(0),
            num_backtracks=jnp.array(0),
        )
        return BroydenState(
            progress=start_progress(y),
            num_rejected_steps=jnp.array(0),
            num_steps=Unfrozen(jnp.array(0)),
            memory=Unfrozen(memory),
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        residual, aux = fn(y, args)
        dtype = working_dtype(y)
        z = jtu.tree_map(lambda x: x.astype(dtype), y)
        residual = jtu.tree_map(lambda x: x.astype(dtype), residual)
        f = jtu.tree_map(jnp.add, residual, z)
        progress = state.progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )
        improved = progress.best_error < state.progress.best_error
        num_steps = state.num_steps.value
        memory = state.memory.value
        done, result = self._verdict(state)
        finished = done | (result != optx.RESULTS.successful)
        num_stalled = jnp.where(improved, 0, memory.num_stalled + 1)
        num_stalled = jnp.where(finished, memory.num_stalled, num_stalled)

        residual_norm = self.norm(residual).astype(dtype)
        # Not `>`, so that a step to a NaN is rejected as well.
        reject = ~(residual_norm <= _MAX_GROWTH * memory.residual_norm)
        reject = reject & (num_steps > 0) & (memory.num_backtracks < _MAX_BACKTRACKS)
        reject = reject & self.line_search
        progress = eqx.tree_at(
            lambda p: (p.diverged, p.finite),
            progress,
            (progress.diverged & ~reject, progress.finite | reject),
        )

        memory, direction = self._update(
            memory, z, num_steps, residual, residual_norm, reject, num_stalled, finished
        )
        new_y = jtu.tree_map(
            lambda b, d, x: (b + d).astype(x.dtype), memory.base, direction, y
        )
        num_rejected_steps = state.num_rejected_steps
        new_state = BroydenState(
            progress=progress,
            num_rejected_steps=jnp.where(
                reject, num_rejected_steps + 1, num_rejected_steps
            ),
            num_steps=Unfrozen(num_steps + 1),
            memory=Unfrozen(memory),
        )
        return new_y, new_state, aux

    def _update(
        self,
        memory: _Memory,
        z: PyTree[Array],
        num_steps: Int[Array, ""],
        residual: PyTree[Array],
        residual_norm: Scalar,
        reject: Bool[Array, ""],
        num_stalled: Int[Array, ""],
        finished: Bool[Array, ""],
    ) -> tuple[_Memory, PyTree[Array]]:
        """Learn from an evaluation; where to go from the last iterate not rejected."""
        # The step that was made, which after rounding is not quite the one asked for.
        step = jtu.tree_map(jnp.subtract, z, memory.base)
        change = jtu.tree_map(jnp.subtract, residual, memory.residual)
        step_square = tree_dot(step, step)
        change_square = tree_dot(change, change)
        # What is not usable is stored as zeros, which take no part in anything. The
        # zeros of a rejected step keep the slot the same for a whole batch.
        usable = (num_steps > 0) & ~reject & (step_square > 0) & (change_square > 0)
        usable = usable & jnp.isfinite(step_square) & jnp.isfinite(change_square)
        step_scale = 1 / jnp.sqrt(jnp.where(usable, step_square, 1))
        change_scale = 1 / jnp.sqrt(jnp.where(usable, change_square, 1))
        if self.good_update is None:
            # `|f(z + s) - f(z)| <= |s|` implies `|y| <= 2 |s|`.
            expansive = change_square > 4 * step_square
            good = usable & (expansive | (num_stalled >= _STALLED_BEFORE_GOOD))
        else:
            good = usable & self.good_update

        def make_q(s, y, old):
            q = jnp.where(good, step_scale * s, change_scale * y)
            return jnp.where(finished, old, jnp.where(usable, q, 0))

        def make_w(s, y, old):
            w = change_scale * (s + y)
            return jnp.where(finished, old, jnp.where(usable, w, 0))

        slot = (num_steps - 1) % self.history_size

        def remember(history, make):
            # Of a finished example what is there. The select of a row costs next to
            # nothing, that of the whole history would cost more than the step.
            old = history_get(history, slot, change)
            row = jtu.tree_map(make, step, change, old)
            return history_set(history, slot, row)

        q = remember(memory.q, make_q)
        w = remember(memory.w, make_w)
        is_good = _shift(memory.is_good, good)

        projections = jnp.roll(history_dot(q, residual), -slot - 1)
        old_projections = _shift(memory.projections, jnp.zeros_like(step_square))
        # The new column of `A` as a difference of projections: no pass of its own.
        column = jnp.where(usable, change_scale * (projections - old_projections), 0)
        cosine = step_scale * change_scale * tree_dot(step, change)
        column = column.at[-1].set(jnp.where(usable, jnp.where(good, cosine, 1), 0))
        base_projections = jnp.where(reject, old_projections, projections)

        # The inverse of `A` if all updates are bad: with ones on the diagonal and zeros
        # below. What is left of it when the oldest pair is dropped is the inverse of
        # what is left of `A`, so that it is never computed anew.
        zeros = jnp.zeros_like(column)
        inverse = _border(memory.inverse, zeros, zeros)
        inverse_column = -_matvec(inverse, column)
        inverse_column = inverse_column.at[-1].set(jnp.where(usable, 1, 0))
        inverse = _border(memory.inverse, zeros, inverse_column)

        def only_bad():
            return zeros, _matvec(inverse, base_projections)

        def some_good():
            row = step_scale * history_dot(w, step)
            row = jnp.where(good, jnp.roll(row, -slot - 1), 0)
            matrix = _border(memory.matrix, row, column)
            return row, _solve(matrix, base_projections)

        # Asked of the whole batch: with a batched predicate both branches are run.
        any_good = eqxi.unvmap_any(jnp.any(is_good))
        row, weights = jax.lax.cond(any_good, some_good, only_bad)
        # A quarter of a step that has overflowed would overflow again; the value at the
        # base, where the step of plain iteration leads, is finite.
        overflown = reject & ~jnp.isfinite(step_square)
        trusted = jnp.all(jnp.isfinite(weights)) & ~overflown
        weights = jnp.where(trusted, weights, 0)
        correction = history_combine(jnp.roll(weights, slot + 1), w, residual)
        base, base_residual = jtu.tree_map(
            lambda new, old: jnp.where(reject, old, new),
            (z, residual),
            (memory.base, memory.residual),
        )
        shorten = reject & ~overflown
        direction = jtu.tree_map(
            lambda s, r, c: jnp.where(shorten, _BACKTRACK * s, r - c),
            step,
            base_residual,
            correction,
        )
        new_memory = _Memory(
            base=base,
            residual=base_residual,
            residual_norm=jnp.where(reject, memory.residual_norm, residual_norm),
            projections=base_projections,
            q=q,
            w=w,
            matrix=jnp.where(
                finished, memory.matrix, _border(memory.matrix, row, column)
            ),
            inverse=inverse,
            is_good=is_good,
            num_stalled=num_stalled,
            num_backtracks=jnp.where(reject, memory.num_backtracks + 1, 0),
        )
        return new_memory, direction

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return self._verdict(state)

    def _verdict(self, state: BroydenState) -> tuple[Bool[Array, ""], optx.RESULTS]:
        done, result = state.progress.verdict()
        stagnates = state.memory.value.num_stalled >= self.patience
        stagnates = stagnates & ~done & (result == optx.RESULTS.successful)
        result = optx.RESULTS.where(
            stagnates,
            optx.RESULTS.stagnation,  # pyright: ignore[reportArgumentType]
            result,
        )
        return done, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, y, args, options, tags, result
        stats = {
            "nfe": state.progress.num_evaluations,
            "num_rejected_steps": state.num_rejected_steps,
        }
        return state.progress.best_y, aux, stats
