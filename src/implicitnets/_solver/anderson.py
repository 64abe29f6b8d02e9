from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_integer,
    check_number,
    check_stopping_rule,
    integer,
    POSITIVE,
    Range,
)
from .._internal.elimination import eliminate
from .._internal.history import empty_history, history_combine, history_dot, history_set
from .._internal.loop import cheap_cond, materialise, SolverState
from .._internal.pytree import (
    tree_cast_like,
    tree_dot,
    tree_ravel,
    tree_reshape_like,
    working_dtype,
)
from .._internal.types import Answer, Aux, Norm, Verdict, Y
from .abstract import AbstractSolver, Problem
from .onset import Onset, start_onset
from .progress import Progress, start_progress


# How small the residual that a combination promises has to be, relative to the newest.
_WORTHWHILE = 0.8


class _History(eqx.Module):
    f: Y
    residual: Y
    f_differences: PyTree[Array]
    residual_differences: PyTree[Array]
    gram: Float[Array, " history history"]
    projection: Float[Array, " history"]
    onset: Onset


def solve_gram(
    gram: Float[Array, " n n"], vector: Float[Array, " n"], ridge: Scalar
) -> Float[Array, " n"]:
    """Solve a small symmetric positive semidefinite system, without ever giving NaN."""
    # The ridge is relative to the diagonal. An entry that depends on those before it,
    # or whose row and column are zero, gets the coefficient zero.
    diagonal = jnp.diagonal(gram)
    regularised = gram + ridge * gram * jnp.eye(vector.shape[0], dtype=gram.dtype)
    return eliminate(
        regularised, vector, lambda k, pivot: pivot > 0.5 * ridge * diagonal[k]
    )


def _replace_row_and_column(matrix, i, row):
    # Selects, which fuse with what is around them; a write would not.
    here = jnp.arange(row.shape[0]) == i
    matrix = jnp.where(here[:, None], row[None, :], matrix)
    return jnp.where(here[None, :], row[:, None], matrix)


def _subtract(x: Y, y: Y, dtype: Any) -> Y:
    return jtu.tree_map(lambda a, b: a.astype(dtype) - b, x, y)


class AndersonAcceleration(
    AbstractSolver[Progress, _History], optx.AbstractFixedPointSolver
):
    r"""Anderson acceleration of a fixed-point iteration, type II.

    Combines the last evaluations so that the residual of a linear map would be least.
    With the differences $\Delta f$ and $\Delta r$ between consecutive evaluations and
    residuals $r = f(z) - z$,

    $$\gamma = \operatorname{argmin} \lVert r_k - \Delta r \, \gamma \rVert, \qquad
    z_{k+1} = f(z_k) - \Delta f \, \gamma.$$

    (Walker and Ni, *Anderson Acceleration for Fixed-Point Iterations*, 2011, equation
    2.2.) One evaluation a step. Accelerates in the second step and then in every
    `period`-th. The other steps are those of the plain iteration (Pratapa,
    Suryanarayana and Pask, *Anderson acceleration of the Jacobi iterative method*,
    2016).

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, and returns the iterate for
    which that holds. A solve that stops before, after `max_steps` for example, returns
    the iterate after the one with the least residual: no evaluation is thrown away, and
    with few of them it is as close to the root as the plain iteration. A solve that
    rounding has stopped ends as `stagnation`, at its best iterate: a quarter of its
    evaluations, and at least eight, had a small residual and found no better iterate,
    and none of their steps got away from the best one. (Not if both tolerances are
    zero, which is a solve for all of `max_steps`.) The statistics have `nfe`, the
    number of evaluations.

    If the history becomes linearly dependent, this difference form leaves it out and
    takes a plain step. The form with coefficients that sum to one takes the average of
    the history, which is slower.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule; of the whole state, not element by element.
    - `history_size`: how many differences are kept, at two states of memory each. A
        longer history converges in fewer steps, each of which costs more. It pays when
        evaluating the map is expensive.
    - `period`: how many steps from one acceleration to the next; 1 for the classical
        method. On most maps 2 or 3 needs fewer evaluations, and on a CPU it costs less
        a step. (An accelerator computes the acceleration in every step, which takes
        less time there than to branch.)
    - `ridge`: the regularisation of the least-squares problem, relative to the diagonal
        of its Gram matrix, which is scaled to one. A problem scaled by any factor
        therefore takes the same steps.
    - `damping`: the weight of the state in every step, accelerated or plain; its value
        has the weight `1 - damping`, which is called `beta` elsewhere. 0 is undamped, a
        negative weight extrapolates.
    - `warmup`: after how many evaluations to accelerate at the latest. Before, it has
        to be shown that it pays: on most random maps the first accelerations shrink the
        residual and not the error. It pays if residuals two steps apart are alike or
        opposite, or if the residual grows. From then on a step is accelerated if that
        promises a residual a fifth smaller. 0 for the classical method, which always
        accelerates.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    history_size: int = integer(5)
    period: int = integer(3)
    ridge: ScalarLike = 1e-7
    damping: ScalarLike = 0.0
    warmup: int = integer(12)

    def __check_init__(self):
        check_stopping_rule(self)
        check_integer(self, "history_size", self.history_size, 1)
        check_integer(self, "period", self.period, 1)
        check_integer(self, "warmup", self.warmup, 0)
        check_number(self, "ridge", self.ridge, POSITIVE)
        weight = Range("a number in the interval [-1, 1)", lambda x: -1 <= x < 1)
        check_number(self, "damping", self.damping, weight)

    def _start(self, problem: Problem, y: Y) -> tuple[Progress, _History]:
        del problem
        m = self.history_size
        y = tree_ravel(y)
        dtype = working_dtype(y)
        zeros = jtu.tree_map(jnp.zeros_like, y)
        empty = empty_history(m, y)
        history = _History(
            f=zeros,
            residual=zeros,
            f_differences=empty,
            residual_differences=empty,
            gram=jnp.zeros((m, m), dtype),
            projection=jnp.zeros(m, dtype),
            onset=start_onset(y),
        )
        return start_progress(y), history

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[Progress, _History]
    ) -> tuple[Y, Progress, _History, Aux]:
        kept, free = state.kept, state.free.value
        num_steps = state.num_steps.value
        f, aux = materialise(problem(y), num_steps)
        shaped = y
        f, y = tree_ravel(f), tree_ravel(y)
        residual = jtu.tree_map(jnp.subtract, f, y)
        progress = kept.update(
            y,
            f,
            residual,
            rtol=self.rtol,
            atol=self.atol,
            norm=lambda x: self.norm(tree_reshape_like(x, shaped)),
        )
        history = self._remember(free, num_steps, f, residual)
        # The counter is the same for a whole batch, so this branches under `vmap` too.
        new_y = cheap_cond(
            (num_steps - 1) % self.period == 0,
            lambda: self._extrapolate(history, num_steps),
            lambda: self._damp(f, residual),
        )
        return tree_reshape_like(new_y, shaped), progress, history, aux

    def _remember(
        self,
        history: _History,
        num_steps: Int[Array, ""],
        f: Y,
        residual: Y,
    ) -> _History:
        # In the first step this stores a difference to zero, in the last slot. It is
        # overwritten before `_extrapolate` lets it take part.
        slot = (num_steps - 1) % self.history_size
        f_difference = jtu.tree_map(jnp.subtract, f, history.f)
        residual_difference = jtu.tree_map(jnp.subtract, residual, history.residual)
        residual_differences = history_set(
            history.residual_differences, slot, residual_difference
        )
        projection = history_dot(residual_differences, residual)
        # The Gram matrix gets a row <dr_j, dr_new>. As `dr_new` is the difference of
        # two residuals, that is the difference of two projections, and takes no second
        # pass over the history. Where `dr_new` itself has just been written, the old
        # projection is that of what was there before.
        row = projection - history.projection
        square = tree_dot(residual_difference, residual_difference)
        row = jnp.where(jnp.arange(self.history_size) == slot, square, row)
        residual_square = tree_dot(residual, residual)
        age = (slot - jnp.arange(self.history_size)) % self.history_size
        overlap = residual_square - jnp.sum(jnp.where(age < 2, projection, 0))
        return _History(
            f=f,
            residual=residual,
            f_differences=history_set(history.f_differences, slot, f_difference),
            residual_differences=residual_differences,
            gram=_replace_row_and_column(history.gram, slot, row),
            projection=projection,
            onset=history.onset.update(
                num_steps, residual_square, overlap, self.warmup
            ),
        )

    def _extrapolate(self, history: _History, num_steps: Int[Array, ""]) -> Y:
        f, residual = history.f, history.residual
        dtype = working_dtype(f)
        stored = (jnp.arange(self.history_size) < num_steps).astype(dtype)
        projection = history.projection * stored
        gamma = solve_gram(
            history.gram * stored[:, None] * stored[None, :],
            projection,
            jnp.asarray(self.ridge, dtype),
        )
        if self.warmup > 0:
            onset = history.onset
            promised = onset.residual_square - jnp.sum(gamma * projection)
            worthwhile = promised < _WORTHWHILE**2 * onset.residual_square
            gamma = jnp.where(onset.started & worthwhile, gamma, 0)
        combined_f = _subtract(
            f, history_combine(gamma, history.f_differences, f), dtype
        )
        if self._is_undamped:
            return tree_cast_like(combined_f, f)
        combined_residual = _subtract(
            residual, history_combine(gamma, history.residual_differences, f), dtype
        )
        return tree_cast_like(self._damp(combined_f, combined_residual), f)

    @property
    def _is_undamped(self) -> bool:
        return isinstance(self.damping, int | float) and self.damping == 0

    def _damp(self, f: Y, residual: Y) -> Y:
        if self._is_undamped:
            return f
        return jtu.tree_map(
            lambda a, r: a - jnp.asarray(self.damping, a.dtype) * r, f, residual
        )

    def _verdict(self, kept: Progress) -> Verdict:
        return kept.verdict()

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: Progress) -> Answer:
        del problem
        answer = tree_reshape_like(kept.answer(tree_ravel(y)), y)
        return answer, aux, {"nfe": kept.num_evaluations}
