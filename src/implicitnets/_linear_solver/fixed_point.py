from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._internal.checks import (
    check_integer,
    check_needs_no_bounds,
    check_part,
    integer,
    Part,
)
from .._internal.optimistix import run_solve
from .._internal.types import LinearSolution, Options, Product, Tags
from .matrix_free import AbstractMatrixFreeSolver


class FixedPointLinearSolver(AbstractMatrixFreeSolver):
    r"""Solve a linear system by any Optimistix fixed-point solver.

    The solution of $A u = b$ is the fixed point of $u \mapsto u + A u - b$. For the
    operator of an implicit adjoint, $A = J - I$, the map is $u \mapsto J u - b$, and in
    reverse mode $u \mapsto J^T u - b$: the backward iteration of Bai et al., *Deep
    Equilibrium Models*, 2019, section 3.1.3. Plain iteration converges where $I + A$
    contracts; acceleration and root finders reach further.

    Starts at `-b`, the first iterate from zero, and stops when `solver` does. The
    solver's residual is that of the linear system; the fixed-point solvers of this
    library measure it relative to the norm of `u + A u - b`, which is about that of the
    solution. Only for real square operators. Under `vmap` every example stops on its
    own.

    This solver supports the following `options` of [`lineax.linear_solve`][]:

    - `y0`: where to start.

    The statistics are those of `solver`: `num_steps`, and `nfe` if the solver counts
    it, which is the number of products with the operator. The result is that of
    `solver`, with `breakdown` for divergence and `singular` for values that are not
    finite, where the solution is NaN.

    **Arguments:**

    - `solver`: any Optimistix fixed-point solver or root finder, for example
        [`implicitnets.AndersonAcceleration`][] or `optimistix.FixedPointIteration`.
    - `max_steps`: the largest number of its steps; `None` for no bound.
    """

    _options: ClassVar[tuple[str, ...]] = ("y0",)

    solver: optx.AbstractFixedPointSolver | optx.AbstractRootFinder
    max_steps: int | None = integer(256)

    def __check_init__(self):
        check_part(self, "solver", self.solver, _SOLVER)
        check_needs_no_bounds(self.solver)
        check_integer(self, "max_steps", self.max_steps, 1, optional=True)

    def _solve(
        self, product: Product, vector: PyTree[Array], options: Options
    ) -> LinearSolution:
        def iteration(u, args):
            del args
            return jtu.tree_map(lambda u, p, b: u + (p - b), u, product(u), vector)

        solution = optx.fixed_point(
            iteration,
            self.solver,
            options.get("y0", jtu.tree_map(jnp.negative, vector)),
            max_steps=self.max_steps,
            adjoint=_NoAdjoint(),
            throw=False,
        )
        stats = {k: v for k, v in solution.stats.items() if k != "max_steps"}
        # Our solvers return their best iterate, of which a gradient would look right.
        nonfinite = solution.result == optx.RESULTS.nonfinite
        value = jtu.tree_map(lambda x: jnp.where(nonfinite, jnp.nan, x), solution.value)
        return value, _as_linear_result(solution.result), stats


_SOLVER = Part(
    "an Optimistix fixed-point solver or root finder",
    optx.AbstractFixedPointSolver | optx.AbstractRootFinder,
    {
        lx.AbstractLinearSolver: "`{name}` is a linear solver by itself.",
        dfx.AbstractSolver: "`implicitnets.SteadyState({name}(...))` makes one of it.",
    },
)


class _NoAdjoint(optx.AbstractAdjoint):
    """No derivative: what differentiates is the linear solve around it."""

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> PyTree[Array]:
        del rewrite_fn, tags
        return run_solve(primal_fn, inputs)


_LINEAR_RESULTS = {
    "nonlinear_max_steps_reached": "max_steps_reached",
    "nonlinear_divergence": "breakdown",
    "nonfinite": "singular",
    "max_steps_reached": "max_steps_reached",
    "singular": "singular",
    "breakdown": "breakdown",
    "stagnation": "stagnation",
    "conlim": "conlim",
    "nonfinite_input": "nonfinite_input",
}


def _as_linear_result(result: optx.RESULTS) -> lx.RESULTS:
    linear_result = lx.RESULTS.successful
    for name, linear_name in _LINEAR_RESULTS.items():
        linear_result = lx.RESULTS.where(
            result == getattr(optx.RESULTS, name),
            getattr(lx.RESULTS, linear_name),
            linear_result,
        )
    return linear_result
