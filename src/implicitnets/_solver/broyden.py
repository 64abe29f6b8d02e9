from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._loop import Unfrozen
from .._misc import (
    check_hyperparameter,
    check_tolerances,
    history_combine,
    history_dot,
    history_set,
    tree_dot,
    working_dtype,
)
from .progress import Progress, start_progress


# With only bad updates, iterates on an expansive map often come to rest where there is
# no root, and good ones get them out. Sooner than this costs contractions evaluations.
_STALLED_BEFORE_GOOD = 10
# Residuals of quasi-Newton methods are not monotone: a line search that asks for a
# decrease fails where none at all does not. This one is for steps that go astray.
_MAX_GROWTH = 3.0
_BACKTRACK = 0.25
_MAX_BACKTRACKS = 10
# Relative to the lengths of the two vectors of the pair.
_MIN_PIVOT = 1e-3


class _Memory(eqx.Module):
    """What the next step needs to know of the steps before it.

    With the steps `s`, the changes `y` of the residual over them, and one row of `Q`
    (`y` for a bad update, `s` for a good one) and of `W` (`s + y`) a pair, scaled by
    `1 / |y|` or `1 / |s|`, the inverse Jacobian is `-I - W^T A^-1 Q`.

    `q` and `w` are ring buffers; everything else runs from the oldest pair to the
    newest, so that `A` is upper triangular but for the rows of good updates.
    """

    step: PyTree[Array]
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


class _BroydenState(eqx.Module):
    progress: Progress
    num_rejected_steps: Int[Array, ""]
    num_steps: Unfrozen[Int[Array, ""]]
    memory: Unfrozen[_Memory]


def _shift(values, new):
    """Drop the oldest entry, append a new one."""
    return jnp.concatenate([values[1:], jnp.asarray(new, values.dtype)[None]])


def _border(matrix, row, column):
    """Drop the oldest row and column, append new ones; `column` has the corner."""
    matrix = jnp.concatenate([matrix[1:, 1:], row[None, :-1]])
    return jnp.concatenate([matrix, column[:, None]], axis=1)


def _matvec(matrix, vector):
    # Multiply and sum, not `dot`: see `history_dot`.
    return jnp.sum(matrix * vector[None, :], axis=1)


def _solve(
    matrix: Float[Array, " n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Gauss-Jordan elimination in the order of the updates.

    A pivot is the denominator of an update given those before it. One that vanishes is
    of an update that would make the Jacobian singular: it gets the coefficient zero.
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


class Broyden(optx.AbstractRootFinder):
    """Broyden's quasi-Newton method with a limited memory.

    One evaluation a step, no derivatives. The inverse Jacobian starts from the `-I` of
    `F(z) = f(z) - z`, so that the first step is that of fixed-point iteration, and is
    corrected by one rank-one update for each of the last `history_size` steps. All
    updates are made afresh from `-I` when the oldest step is dropped (a compact
    representation, so this costs two passes over the history a step, as any limited
    memory does). Overwriting the oldest rank-one term instead, as is often done, is no
    truncation of anything, as the later terms were made relative to it; it diverges.

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, with `f(z) = F(z) + z`
    also in a root-finding problem; checked on an iterate that was evaluated. The best
    iterate that was evaluated is returned. The solve also ends, with the result

    - `nonfinite`, when the function returns a NaN or infinity;
    - `nonlinear_divergence`, when the residual norm exceeds 1000 times the larger of
        the first residual norm and the first `norm(f(z))`;
    - `stagnation`, when `patience` evaluations have brought no new best iterate.

    !!! info

        Broyden's "good" update is the smallest change of the Jacobian that agrees with
        a step, his "bad" update the smallest change of the inverse. On nonexpansive
        maps the bad one needs fewer evaluations throughout, and in a short memory far
        fewer; on a map that expands some directions a lot, the good one does. So each
        step gets the good update if it proves the map expansive (the residual changed
        by more than twice the step's length) or if there was no new best iterate in the
        last ten evaluations, and the bad one otherwise. As long as no example of a
        batch needs a good update, nobody pays for its third pass and its elimination.

    ??? cite "References"

        Good and bad updates: C. G. Broyden, *A class of methods for solving nonlinear
        simultaneous equations*, Mathematics of Computation 19 (1965). Combining them:
        J. M. Martínez, *Practical quasi-Newton methods for solving nonlinear systems*,
        Journal of Computational and Applied Mathematics 124 (2000), section 2. Compact
        representation: R. H. Byrd, J. Nocedal, R. B. Schnabel, *Representations of
        quasi-Newton matrices and their use in limited memory methods*, Mathematical
        Programming 63 (1994), section 6.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule and of the line search.
    - `history_size`: how many of the last steps are remembered; each takes the memory
        of two states. At least `max_steps` for a full memory, which some strongly
        expansive maps need.
    - `good_update`: `True` for only good updates, `False` for only bad ones, `None` for
        the choice described above.
    - `line_search`: whether to take back a step that increases the residual norm more
        than sixfold, and to try a quarter of it, at most ten times in a row. Each trial
        is one step and one evaluation. It hardly ever acts on a contraction; on
        expansive maps it saves most of the solves that diverge without it.
    - `patience`: after how many evaluations without a new best iterate to give up.
    """

    rtol: float
    atol: float
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    history_size: int = 10
    good_update: bool | None = None
    line_search: bool = True
    patience: int = 100

    def __check_init__(self):
        check_tolerances(self)
        for name in ("history_size", "patience"):
            value = getattr(self, name)
            check_hyperparameter(
                self,
                name,
                isinstance(value, int) and value >= 1,
                "an integer of at least 1",
            )
        check_hyperparameter(
            self, "good_update", self.good_update in (True, False, None), "a bool or None"
        )

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, aux_struct, tags
        y_struct = jax.eval_shape(lambda: y)
        if jtu.tree_structure(f_struct) != jtu.tree_structure(y_struct) or [
            x.shape for x in jtu.tree_leaves(f_struct)
        ] != [x.shape for x in jtu.tree_leaves(y_struct)]:
            raise ValueError(
                "`Broyden` needs a function whose output has the structure and shapes "
                f"of its input; got {f_struct} for {y_struct}."
            )
        m = self.history_size
        dtype = working_dtype(y)
        zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, dtype), y)
        empty = jtu.tree_map(lambda x: jnp.zeros((m, *x.shape), dtype), y)
        memory = _Memory(
            step=zeros,
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
        return _BroydenState(
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
        num_steps = state.num_steps.value
        memory = state.memory.value

        residual_norm = self.norm(residual)
        # Not `>`: a NaN is a step gone astray as well.
        reject = ~(residual_norm <= _MAX_GROWTH * memory.residual_norm)
        reject = reject & (num_steps > 0) & (memory.num_backtracks < _MAX_BACKTRACKS)
        reject = reject & self.line_search
        progress = eqx.tree_at(
            lambda p: (p.diverged, p.finite),
            progress,
            (progress.diverged & ~reject, progress.finite | reject),
        )
        improved = progress.best_error < state.progress.best_error
        num_stalled = jnp.where(improved, 0, memory.num_stalled + 1)

        memory, direction = self._update(
            memory, num_steps, residual, residual_norm, reject, num_stalled
        )
        base = jtu.tree_map(lambda x, s: jnp.where(reject, x - s, x), z, memory.step)
        step = jtu.tree_map(
            lambda s, d: jnp.where(reject, _BACKTRACK * s, d), memory.step, direction
        )
        new_y = jtu.tree_map(lambda b, s, x: (b + s).astype(x.dtype), base, step, y)
        # The step that was made, which in low precision is not the one asked for.
        step = jtu.tree_map(lambda x, b: x.astype(dtype) - b, new_y, base)
        new_state = _BroydenState(
            progress=progress,
            num_rejected_steps=state.num_rejected_steps + reject,
            num_steps=Unfrozen(num_steps + 1),
            memory=Unfrozen(eqx.tree_at(lambda m: m.step, memory, step)),
        )
        return new_y, new_state, aux

    def _update(
        self,
        memory: _Memory,
        num_steps: Int[Array, ""],
        residual: PyTree[Array],
        residual_norm: Scalar,
        reject: Bool[Array, ""],
        num_stalled: Int[Array, ""],
    ) -> tuple[_Memory, PyTree[Array]]:
        """Learn from one evaluation; where to go next from the accepted iterate."""
        m = self.history_size
        change = jtu.tree_map(jnp.subtract, residual, memory.residual)
        step_square = tree_dot(memory.step, memory.step)
        change_square = tree_dot(change, change)
        product = tree_dot(memory.step, change)
        # A pair that is not usable is stored as zeros, which no one divides by.
        usable = (num_steps > 0) & ~reject & (step_square > 0) & (change_square > 0)
        usable = usable & jnp.isfinite(step_square) & jnp.isfinite(change_square)
        step_scale = 1 / jnp.sqrt(jnp.where(usable, step_square, 1))
        change_scale = 1 / jnp.sqrt(jnp.where(usable, change_square, 1))
        if self.good_update is None:
            expansive = change_square > 4 * step_square
            good = expansive | (num_stalled >= _STALLED_BEFORE_GOOD)
        else:
            good = jnp.array(self.good_update)
        good = good & usable

        def project(s, y):
            q = jnp.where(good, step_scale * s, change_scale * y)
            return jnp.where(usable, q, 0)

        def correct(s, y):
            return jnp.where(usable, change_scale * (s + y), 0)

        slot = (num_steps - 1) % m
        q = jtu.tree_map(project, memory.step, change)
        w = jtu.tree_map(correct, memory.step, change)
        q_history = history_set(memory.q, slot, q)
        w_history = history_set(memory.w, slot, w)
        is_good = _shift(memory.is_good, good)

        projections = jnp.roll(history_dot(q_history, residual), -slot - 1)
        base_projections = _shift(memory.projections, jnp.zeros_like(product))
        # The new column is `Q y / |y|`, which as a difference of the projections of two
        # residuals costs no pass over the history.
        column = jnp.where(usable, change_scale * (projections - base_projections), 0)
        corner = jnp.where(good, step_scale * change_scale * product, 1)
        column = column.at[-1].set(jnp.where(usable, corner, 0))
        base_projections = jnp.where(reject, base_projections, projections)

        # The inverse of the upper triangle if its diagonal were of ones, as it is with
        # bad updates only. What remains when its first row and column are dropped is
        # the inverse of what remains of the matrix, so it is never computed anew.
        zeros = jnp.zeros_like(column)
        inverse = _border(memory.inverse, zeros, zeros)
        inverse_column = -_matvec(inverse, column)
        inverse_column = inverse_column.at[-1].set(jnp.where(usable, 1, 0))
        inverse = _border(memory.inverse, zeros, inverse_column)

        def only_bad():
            return zeros, _matvec(inverse, base_projections)

        def some_good():
            row = step_scale * history_dot(w_history, memory.step)
            row = jnp.where(good, jnp.roll(row, -slot - 1), 0)
            matrix = _border(memory.matrix, row, column)
            return row, _solve(matrix, base_projections)

        # Asked of the whole batch: a batched predicate would have both branches run.
        any_good = eqxi.unvmap_any(jnp.any(is_good))
        row, weights = jax.lax.cond(any_good, some_good, only_bad)
        weights = jnp.where(jnp.all(jnp.isfinite(weights)), weights, 0)
        correction = history_combine(jnp.roll(weights, slot + 1), w_history)
        base_residual = jtu.tree_map(
            lambda new, old: jnp.where(reject, old, new), residual, memory.residual
        )
        direction = jtu.tree_map(jnp.subtract, base_residual, correction)
        new_memory = _Memory(
            step=memory.step,
            residual=base_residual,
            residual_norm=jnp.where(reject, memory.residual_norm, residual_norm),
            projections=base_projections,
            q=q_history,
            w=w_history,
            matrix=_border(memory.matrix, row, column),
            inverse=inverse,
            is_good=is_good,
            num_stalled=num_stalled,
            num_backtracks=jnp.where(reject, memory.num_backtracks + 1, 0),
        )
        return new_memory, direction

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        done, result = state.progress.verdict()
        stagnated = state.memory.value.num_stalled >= self.patience
        stagnated = stagnated & ~done & (result == optx.RESULTS.successful)
        return done, optx.RESULTS.where(stagnated, optx.RESULTS.stagnation, result)

    def postprocess(
        self, fn, y, aux, args, options, state, tags, result
    ) -> tuple[PyTree[Array], Any, dict[str, Any]]:
        del fn, y, args, options, tags, result
        stats = {
            "nfe": state.progress.num_evaluations,
            "num_rejected_steps": state.num_rejected_steps,
        }
        return state.progress.best_y, aux, stats
