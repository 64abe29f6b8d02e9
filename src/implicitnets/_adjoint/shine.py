from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.checks import check_integer, integer
from .._internal.optimistix import solve_inputs, SolveOutputs
from .._internal.types import LinearSolution, Tags
from .._linear_solver.gmres import GivensGMRES
from .._linear_solver.solve import linear_operator, run_linear_solver
from .._solver.broyden import Broyden, BroydenState, inverse_jacobian
from .report import AbstractReportingAdjoint, AdjointReport
from .root import AbstractInversion, differentiate_root


class ShineAdjoint(AbstractReportingAdjoint):
    """Differentiate with the inverse Jacobian that the forward solve has built up.

    [`implicitnets.Broyden`][] ends with an estimate of the inverse Jacobian at the
    root. Applying it takes two passes over the solver's history and no Jacobian product
    (Ramzi et al., *SHINE: SHaring the INverse Estimate from the forward pass for
    bi-level optimization and implicit models*, 2022, section 2.1). Then
    `refinement_steps` steps of GMRES follow. They start at the estimated solution, with
    the inverse as the right preconditioner. (The paper refines by another iterative
    solve, section 2.3.)

    Works in forward mode, in reverse mode and to any order, though the estimate is no
    better in a second derivative than in a first.

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** that of the estimate, which is accurate along the few directions in which
    the forward solve has moved. Elsewhere it is the identity, which
    [`implicitnets.JacobianFreeAdjoint`][] uses everywhere. Every step of refinement
    lessens the residual and brings the gradient closer in direction to the exact one;
    the first may add to its error, since it scales the estimate down. The
    [report](../report.md#every-adjoint) compares SHINE with the other inexact adjoints.

    **Memory:** one evaluation of the function, the forward solve's history (two states
    for each of its `history_size` steps), and with refinement `refinement_steps + 2`
    states.

    **Cost:** no Jacobian product without refinement, `refinement_steps + 1` with it.

    **Arguments:**

    - `refinement_steps`: how many steps of GMRES; 0 for the estimate as it is.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][]. The result is
        successful unless the estimate is not finite; `-I` then takes its place, and the
        result is `breakdown`.

    **Raises:**

    `TypeError` when solving, for a solver that neither is nor contains an
    [`implicitnets.Broyden`][].
    """

    refinement_steps: int = integer(0)
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_integer(self, "refinement_steps", self.refinement_steps, 0)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        solver = solve_inputs(inputs).solver
        if not _find(solver, Broyden):
            raise TypeError(
                "`ShineAdjoint` uses the inverse Jacobian of `implicitnets.Broyden`; "
                f"got the solver `{type(solver).__name__}`, which has none."
            )
        inversion = _Inversion(self.refinement_steps)
        return differentiate_root(
            primal_fn, rewrite_fn, inputs, tags, inversion, self.probe
        )


class _Inversion(AbstractInversion):
    refinement_steps: int

    def solve(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        aux: PyTree,
        transposed: bool,
    ) -> LinearSolution:
        # The solver may be wrapped, and so its state.
        state, *_ = _find(SolveOutputs(*aux).state, BroydenState)
        inverse = inverse_jacobian(state)
        if transposed:
            inverse = inverse.transpose()
        result = lx.RESULTS.where(
            inverse.finite, lx.RESULTS.successful, lx.RESULTS.breakdown
        )
        if self.refinement_steps == 0:
            return inverse.mv(vector), result, {"num_steps": jnp.array(0)}
        # No tolerance: all the steps that were asked for. A start at the estimate would
        # cost a product for its residual. One more step from zero costs as much and
        # searches a larger space, whose first vector is the estimate.
        num_products = self.refinement_steps + 1
        solver = GivensGMRES(
            rtol=0.0, atol=0.0, max_steps=num_products, restart=num_products
        )
        preconditioner = linear_operator(inverse.mv, vector)
        options = {"preconditioner": preconditioner}
        value, _, stats = run_linear_solver(operator, vector, solver, options)
        return value, result, stats


def _find(tree: PyTree, kind: type) -> list:
    def is_kind(node):
        return isinstance(node, kind)

    return [node for node in jtu.tree_leaves(tree, is_leaf=is_kind) if is_kind(node)]
