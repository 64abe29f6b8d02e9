from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Scalar, ScalarLike

from .._internal.checks import check_number, check_stopping_rule, POSITIVE
from .._internal.convolution import fast_convolutions
from .._internal.loop import materialise, SolverState
from .._internal.pytree import working_dtype
from .._internal.types import Answer, Aux, Norm, Verdict, Y
from .abstract import AbstractSolver, Problem
from .monotone import cell_and_input, combine, part_norms
from .progress import Progress, start_progress


class _Iteration(eqx.Module):
    step_size: Scalar
    injected: Y
    resolvent: Callable
    u: Y


class PeacemanRachford(
    AbstractSolver[Progress, _Iteration], optx.AbstractFixedPointSolver
):
    r"""Peaceman-Rachford splitting, for monotone cells: few steps, for any step size.

    $$u_{k+1/2} = 2 z_k - u_k, \quad
    z_{k+1/2} = (I + \alpha (I - W))^{-1} (u_{k+1/2} + \alpha u(x)), \quad
    u_{k+1} = 2 z_{k+1/2} - u_{k+1/2}, \quad
    z_{k+1} = \operatorname{prox}_{\alpha\varphi}(u_{k+1}).$$

    One evaluation and one product with the inverse a step. The inverse is prepared once
    a solve, for a whole batch. For [`implicitnets.nn.MonotoneCell`][] it is that of a
    matrix, for a periodic [`implicitnets.nn.MonotoneConvCell`][] that of one matrix a
    frequency; without periodicity the product is a linear solve. Converges for every
    input and every step size.

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, and returns the iterate
    with the least residual of all that were evaluated. Ends as `stagnation` where
    rounding has stopped it, as [`implicitnets.AndersonAcceleration`][] does. The
    statistics have `nfe`, the number of evaluations.

    For [`implicitnets.nn.AbstractMonotoneCell`][]s only, which it is told in the same
    way as [`implicitnets.ForwardBackward`][].

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, algorithm 2.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `step_size`: $\alpha$; `None` for the one with the best guaranteed rate, estimated
        once a solve: $1 / \sqrt{m \lVert S \rVert + \lVert K \rVert^2}$, with
        $S$ and $K$ and at the cost of [`implicitnets.ForwardBackward`][].
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    step_size: ScalarLike | None = None

    def __check_init__(self):
        check_stopping_rule(self)
        check_number(self, "step_size", self.step_size, POSITIVE, optional=True)

    def _start(self, problem: Problem, y: Y) -> tuple[Progress, _Iteration]:
        cell, x = cell_and_input(self, problem.args)
        if self.step_size is None:
            symmetric, skew = part_norms(cell, y)
            # With the cocoercivity `b` of `I - W` a step contracts at least by the
            # square root of `1 - 4 / (1 / (a m) + a / b + 2)`.
            step_size = 1 / jnp.sqrt(cell.margin * symmetric + skew**2)
        else:
            step_size = self.step_size
        step_size = jnp.asarray(step_size, working_dtype(y))
        iteration = _Iteration(
            step_size=step_size,
            injected=fast_convolutions(cell.inject)(x),
            resolvent=cell.resolvent(y, step_size),
            u=y,
        )
        return start_progress(y), iteration

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[Progress, _Iteration]
    ) -> tuple[Y, Progress, _Iteration, Aux]:
        kept, free = state.kept, state.free.value
        num_steps = state.num_steps.value
        cell, _ = cell_and_input(self, problem.args)
        f, aux = materialise(problem(y), num_steps)
        residual = jtu.tree_map(jnp.subtract, f, y)
        progress = self._judge(kept, y, f, residual)
        step_size = free.step_size
        half_u = combine(lambda z, u: 2 * z - u, y, free.u)
        half_z = free.resolvent(
            combine(lambda u, b: u + step_size * b, half_u, free.injected)
        )
        u = combine(lambda z, u: 2 * z - u, half_z, half_u)
        iteration = _Iteration(step_size, free.injected, free.resolvent, u)
        return cell.proximal(u, step_size), progress, iteration, aux

    def _verdict(self, kept: Progress) -> Verdict:
        return kept.verdict()

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: Progress) -> Answer:
        del problem
        return kept.answer(y), aux, {"nfe": kept.num_evaluations}
