import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar, ScalarLike

from .._internal.checks import (
    check_flag,
    check_integer,
    check_stopping_rule,
    integer,
)
from .._internal.history import empty_history, history_combine, history_dot
from .._internal.loop import SolverState, Unfrozen
from .._internal.pytree import (
    tree_astype,
    tree_cast_like,
    tree_dot,
    working_dtype,
)
from .._internal.types import Answer, Aux, Norm, Verdict, Y
from .._internal.unvmap import unvmap_any
from .abstract import AbstractSolver, Problem
from .compact import (
    InverseJacobian,
    matvec,
    replace,
    replace_in_inverse,
    Secant,
    solve,
    Updates,
)
from .onset import Onset, start_onset
from .progress import Progress, start_progress


# With only bad updates, iterates on an expansive map often come to rest where there is
# no root, and good ones get them out. Sooner than this costs contractions evaluations.
_STALLED_BEFORE_GOOD = 10

# Residuals of quasi-Newton methods are not monotone: a line search that asks for a
# decrease fails where none at all does not. This one is for steps that go astray.
_MAX_GROWTH = 3.0
_BACKTRACK = 0.25
_MAX_BACKTRACKS = 10


class BroydenState(eqx.Module):
    """What is kept of a [`Broyden`][] solve.

    The updates are kept too, so that the inverse can be used after the solve. They are
    marked as free because the step itself holds them still: see `Updates.remember`.
    """

    progress: Progress
    num_stalled: Int[Array, ""]
    num_rejected_steps: Int[Array, ""]
    updates: Unfrozen[Updates]


class _Core(eqx.Module):
    """Small things, in the order of the ring buffers.

    `projections` are those of the base's residual on `Q`. `inverse` is that of `A` if
    all updates are bad.
    """

    projections: Float[Array, " history"]
    inverse: Float[Array, " history history"]
    is_good: Bool[Array, " history"]


class _Memory(eqx.Module):
    """Of the base, which is the last iterate that was not rejected."""

    base: Y
    residual: Y
    residual_norm: Scalar
    num_backtracks: Int[Array, ""]
    core: _Core
    onset: Onset
    change_length: Scalar
    # As the verdict of the step before. To read that itself costs a GPU three copies a
    # step, since this step writes the next one over it.
    finished: Bool[Array, ""]


def inverse_jacobian(state: BroydenState) -> InverseJacobian:
    """The inverse Jacobian that the next step of a solve would use."""
    return state.updates.value.inverse(state.progress.num_evaluations - 1)


class Broyden(AbstractSolver[BroydenState, _Memory], optx.AbstractRootFinder):
    """Broyden's quasi-Newton method with a limited memory.

    One evaluation a step and no derivatives. The inverse Jacobian starts as `-I`, which
    is that of `F(z) = f(z) - z` where `f` is constant, so that the first step is the
    fixed-point iteration's. It has a rank-one update for each of the last
    `history_size` steps. When the oldest step is dropped, all updates are made again
    from `-I`. In a compact representation that takes no more than the two passes over
    the history that any step takes. (It is common to overwrite the oldest rank-one term
    instead. That diverges, since the other terms were made relative to it.)

    Stops when `norm(F(z)) <= atol + rtol * norm(F(z) + z)`, which for the root
    `F(z) = f(z) - z` of a fixed-point problem is the rule of
    [`implicitnets.AndersonAcceleration`][]. The rule is checked on an iterate that was
    evaluated. A solve that stops before it holds returns the iterate after the best
    one. It ends as unsuccessful with the result `nonfinite`, `nonlinear_divergence`
    (the residual norm exceeds 1000 times the largest of the first residual norm, the
    first `norm(F(z) + z)` and the two-norm of a state of ones) or `stagnation`
    (`patience` evaluations without a new best iterate, or rounding has stopped it, as
    in [`implicitnets.AndersonAcceleration`][]).

    Broyden's good update is the least change of the Jacobian that agrees with a step.
    His bad update is the least change of the inverse. On most contractions the bad
    update takes fewer evaluations; on maps that expand along some directions, or along
    all of them, the good update does. By default a step gets a good update if it proves
    the map expansive (the residual changed by more than twice the step's length) or if
    ten evaluations have brought no new best iterate, and a bad one otherwise. That is
    about as fast as the better of the two, except on strongly expansive maps. The good
    update's third pass over the history and its elimination are run only if some
    example of a batch needs them.

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
        strongly expansive map may need all of them, that is `max_steps`.
    - `good_update`: `True` for good updates only, `False` for bad ones only, `None` for
        the choice above. Good updates are more robust on strongly expansive maps.
    - `line_search`: whether to reject a step that more than triples the residual norm,
        or leads to where the function is not finite, and to try a quarter of it, at
        most ten times in a row. Each trial is a step with its evaluation. It hardly
        ever acts on a contraction, and saves most solves that start too far away.
    - `patience`: after how many evaluations without a new best iterate to give up.
    - `warmup`: as for [`implicitnets.AndersonAcceleration`][]. Updates are made from
        the first step on, and used from the onset on.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    history_size: int = integer(10)
    good_update: bool | None = None
    line_search: bool = True
    patience: int = integer(150)
    warmup: int = integer(12)

    def __check_init__(self):
        check_stopping_rule(self)
        check_integer(self, "history_size", self.history_size, 1)
        check_integer(self, "patience", self.patience, 1)
        check_integer(self, "warmup", self.warmup, 0)
        check_flag(self, "good_update", self.good_update, optional=True)
        check_flag(self, "line_search", self.line_search)

    def _start(self, problem: Problem, y: Y) -> tuple[BroydenState, _Memory]:
        del problem
        m = self.history_size
        dtype = working_dtype(y)
        zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, dtype), y)
        empty = empty_history(m, y, dtype)
        kept = BroydenState(
            progress=start_progress(y),
            num_stalled=jnp.array(0),
            num_rejected_steps=jnp.array(0),
            updates=Unfrozen(Updates(empty, empty, jnp.zeros((m, m), dtype))),
        )
        memory = _Memory(
            base=zeros,
            residual=zeros,
            residual_norm=jnp.array(jnp.inf, dtype),
            num_backtracks=jnp.array(0),
            core=_Core(
                projections=jnp.zeros(m, dtype),
                inverse=jnp.zeros((m, m), dtype),
                is_good=jnp.zeros(m, bool),
            ),
            onset=start_onset(y),
            change_length=jnp.zeros((), dtype),
            finished=jnp.array(False),
        )
        return kept, memory

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[BroydenState, _Memory]
    ) -> tuple[Y, BroydenState, _Memory, Aux]:
        kept, free = state.kept, state.free.value
        num_steps = state.num_steps.value
        residual, aux = problem(y)
        dtype = working_dtype(y)
        z, residual = tree_astype(y, dtype), tree_astype(residual, dtype)
        f = jtu.tree_map(jnp.add, residual, z)
        progress = self._judge(kept.progress, y, f, residual)
        improved = progress.best_error < kept.progress.best_error
        num_stalled = jnp.where(improved, 0, kept.num_stalled + 1)

        residual_norm = self.norm(residual).astype(dtype)
        reject = self._rejects(free, num_steps, residual_norm)
        # What is wrong with a rejected iterate is not the verdict on the solve.
        progress = eqx.tree_at(
            lambda p: (p.diverged, p.finite),
            progress,
            (progress.diverged & ~reject, progress.finite | reject),
        )
        stalled = num_stalled >= _STALLED_BEFORE_GOOD
        secant, overflown = self._secant(
            free, z, residual, stalled, usable=(num_steps > 0) & ~reject
        )
        slot = (num_steps - 1) % self.history_size
        updates, core, weights = _learn(
            kept.updates.value, free.core, secant, residual, slot, reject, free.finished
        )

        # A quarter of a step that has overflowed would overflow again. The value at the
        # base is finite, and plain iteration leads there.
        overflown = reject & overflown
        onset, change_length = self._onset(
            free, num_steps, residual, core.projections, secant, slot
        )
        trusted = jnp.all(jnp.isfinite(weights)) & ~overflown
        weights = jnp.where(trusted & onset.started, weights, 0)
        correction = history_combine(weights, updates.w, residual)
        base, base_residual = jtu.tree_map(
            lambda new, old: jnp.where(reject, old, new),
            (z, residual),
            (free.base, free.residual),
        )
        shorten = reject & ~overflown
        direction = jtu.tree_map(
            lambda s, r, c: jnp.where(shorten, _BACKTRACK * s, r - c),
            secant.step,
            base_residual,
            correction,
        )
        new_y = tree_cast_like(jtu.tree_map(jnp.add, base, direction), y)
        new_kept = BroydenState(
            progress=progress,
            num_stalled=num_stalled,
            num_rejected_steps=kept.num_rejected_steps + jnp.where(reject, 1, 0),
            updates=Unfrozen(updates),
        )
        done, result = self._verdict(new_kept)
        memory = _Memory(
            base=base,
            residual=base_residual,
            residual_norm=jnp.where(reject, free.residual_norm, residual_norm),
            num_backtracks=jnp.where(reject, free.num_backtracks + 1, 0),
            core=core,
            onset=onset,
            change_length=jnp.where(
                reject, free.change_length, 1 / secant.change_scale
            ),
            finished=free.finished | done | (result != optx.RESULTS.successful),
        )
        return new_y, new_kept, memory, aux

    def _rejects(
        self, memory: _Memory, num_steps: Int[Array, ""], residual_norm: Scalar
    ) -> Bool[Array, ""]:
        # Not `>`, so that a step to a NaN is rejected as well.
        reject = ~(residual_norm <= _MAX_GROWTH * memory.residual_norm)
        reject = reject & (num_steps > 0) & (memory.num_backtracks < _MAX_BACKTRACKS)
        return reject & self.line_search

    def _onset(
        self,
        memory: _Memory,
        num_steps: Int[Array, ""],
        residual: Y,
        projections: Float[Array, " history"],
        secant: Secant,
        slot: Int[Array, ""],
    ) -> tuple[Onset, Scalar]:
        """Whether to use updates, and the length of the residual's newest change."""
        # All updates before the onset are bad: projections on changes of unit length.
        length = 1 / secant.change_scale
        age = (slot - jnp.arange(self.history_size)) % self.history_size
        lengths = jnp.where(age == 0, length, memory.change_length)
        changes = jnp.where(age < 2, lengths * projections, 0)
        square = tree_dot(residual, residual)
        overlap = square - jnp.sum(changes)
        onset = memory.onset.update(num_steps, square, overlap, self.warmup)
        return onset, length

    def _secant(
        self,
        memory: _Memory,
        z: Y,
        residual: Y,
        stalled: Bool[Array, ""],
        usable: Bool[Array, ""],
    ) -> tuple[Secant, Bool[Array, ""]]:
        """From the base to here, and whether the step's length has overflowed."""
        # The step that was made, which after rounding is not quite the one asked for.
        step = jtu.tree_map(jnp.subtract, z, memory.base)
        change = jtu.tree_map(jnp.subtract, residual, memory.residual)
        step_square = tree_dot(step, step)
        change_square = tree_dot(change, change)
        usable = usable & (step_square > 0) & (change_square > 0)
        usable = usable & jnp.isfinite(step_square) & jnp.isfinite(change_square)
        if self.good_update is None:
            # `|f(z + s) - f(z)| <= |s|` implies `|y| <= 2 |s|`.
            expansive = change_square > 4 * step_square
            good = usable & (expansive | stalled)
        else:
            good = usable & self.good_update
        secant = Secant(
            step=step,
            change=change,
            step_scale=1 / jnp.sqrt(jnp.where(usable, step_square, 1)),
            change_scale=1 / jnp.sqrt(jnp.where(usable, change_square, 1)),
            usable=usable,
            good=good,
        )
        return secant, ~jnp.isfinite(step_square)

    def _verdict(self, kept: BroydenState) -> Verdict:
        return kept.progress.verdict(stuck=kept.num_stalled >= self.patience)

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: BroydenState) -> Answer:
        del problem
        stats = {
            "nfe": kept.progress.num_evaluations,
            "num_rejected_steps": kept.num_rejected_steps,
        }
        return kept.progress.answer(y), aux, stats


def _learn(
    updates: Updates,
    core: _Core,
    secant: Secant,
    residual: Y,
    slot: Int[Array, ""],
    reject: Bool[Array, ""],
    finished: Bool[Array, ""],
) -> tuple[Updates, _Core, Float[Array, " history"]]:
    """With a secant, and the weights in `W` of the correction at the base."""
    q, w = updates.remember(secant, slot, frozen=finished)
    newest = jnp.arange(core.is_good.shape[0]) == slot
    projections = history_dot(q, residual)
    # Those of the base on the rows that are left. The row of a rejected step is zero.
    old_projections = jnp.where(newest, 0, core.projections)
    column = _new_column(secant, projections - old_projections, newest)
    core = _Core(
        projections=jnp.where(reject, old_projections, projections),
        inverse=replace_in_inverse(core.inverse, newest, column, secant.usable),
        is_good=jnp.where(newest, secant.good, core.is_good),
    )

    def only_bad():
        return jnp.zeros_like(column), matvec(core.inverse, core.projections)

    def some_good():
        row = secant.step_scale * history_dot(w, secant.step)
        row = jnp.where(secant.good, row, 0)
        matrix = replace(updates.matrix, newest, row, column)
        return row, solve(matrix, core.projections, slot + 1)

    # Asked of the whole batch: with a batched predicate both branches are run.
    any_good = unvmap_any(jnp.any(core.is_good))
    row, weights = jax.lax.cond(any_good, some_good, only_bad)
    matrix = replace(updates.matrix, newest, row, column)
    matrix = jnp.where(finished, updates.matrix, matrix)
    return Updates(q, w, matrix), core, weights


def _new_column(
    secant: Secant,
    difference: Float[Array, " history"],
    newest: Bool[Array, " history"],
) -> Float[Array, " history"]:
    """Of `A`, from the differences of projections: no pass over the history."""
    column = jnp.where(secant.usable, secant.change_scale * difference, 0)
    # The corner is set: the new row has no old projection to subtract.
    cosine = secant.step_scale * secant.change_scale
    cosine = cosine * tree_dot(secant.step, secant.change)
    corner = jnp.where(secant.good, cosine, 1)
    return jnp.where(newest, jnp.where(secant.usable, corner, 0), column)
