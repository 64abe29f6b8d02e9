from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.checks import check_part, LINEAR_SOLVER
from .._internal.pytree import tree_all_finite
from .._internal.types import LinearSolution, Tags
from .._internal.unvmap import unvmap_any
from .._linear_solver.gmres import GivensGMRES
from .._linear_solver.solve import run_linear_solver
from .report import AbstractReportingAdjoint, AdjointReport
from .root import AbstractInversion, differentiate_root


class ImplicitAdjoint(AbstractReportingAdjoint):
    r"""Differentiate through the implicit function theorem.

    At a root $F(z^*, \theta) = 0$ the tangent of the root solves the linear system

    $$\frac{\partial F}{\partial z} \dot z
    = - \frac{\partial F}{\partial \theta} \dot\theta$$

    and reverse mode solves the transposed system (Bai et al., *Deep Equilibrium
    Models*, 2019, Theorem 1). Works in forward mode, in reverse mode and to any order,
    under `vmap` and `jit`, in every Optimistix solve. The program has no host callback
    and so exports to other platforms.

    The backward pass never raises. A linear solve that did not converge gives the best
    solution that it found, or that of the `fallback`;
    [`implicitnets.AdjointReport`][] tells which. A cotangent or a Jacobian that is not
    finite gives NaN.

    The right-hand side is scaled to unit norm before the linear solve, and the solution
    is scaled back. So the relative error of a gradient does not depend on the scale of
    the loss, whatever the linear solver's absolute tolerance.

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** none but the residuals of the linear solve and of the forward solve.

    **Memory:** one evaluation of the function and what the linear solver needs
    (`restart + 1` states by default), whatever the number of steps of the forward
    solve.

    **Cost:** as many Jacobian products as the linear solver takes. The default, GMRES
    with a restart of 20, is close to the fastest on most problems. Choose a longer
    restart for a map that expands. Anderson acceleration, by
    [`implicitnets.FixedPointLinearSolver`][], needs half of the memory, and its
    gradients are less accurate at the same tolerance. The
    [report](../report.md#linear-solvers-of-the-implicit-adjoint) compares them.

    **Arguments:**

    - `linear_solver`: any Lineax solver for the linear systems. The default is
        [`implicitnets.GivensGMRES`][] to a relative residual of `1e-4`.
    - `fallback`: a Lineax solver for the systems on which `linear_solver` was not
        successful or gave values that are not finite. It runs only if some example of a
        batch needs it, and is used for those examples only. A cheap choice that cannot
        fail is [`implicitnets.NeumannSeries`][], which gives a phantom gradient. `None`
        to use what `linear_solver` gave.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][].
    """

    linear_solver: lx.AbstractLinearSolver = GivensGMRES(rtol=1e-4, atol=0.0)
    fallback: lx.AbstractLinearSolver | None = None
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_part(self, "linear_solver", self.linear_solver, LINEAR_SOLVER)
        check_part(self, "fallback", self.fallback, LINEAR_SOLVER, optional=True)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        inversion = _Inversion(self.linear_solver, self.fallback)
        return differentiate_root(
            primal_fn, rewrite_fn, inputs, tags, inversion, self.probe
        )


class _Inversion(AbstractInversion):
    linear_solver: lx.AbstractLinearSolver
    fallback: lx.AbstractLinearSolver | None

    def solve(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        aux: PyTree,
        transposed: bool,
    ) -> LinearSolution:
        del aux, transposed
        value, result, stats = run_linear_solver(operator, vector, self.linear_solver)
        if self.fallback is None:
            return value, result, stats
        fallback = self.fallback
        failed = (result != lx.RESULTS.successful) | ~tree_all_finite(value)

        def fall_back():
            other, _, _ = run_linear_solver(operator, vector, fallback)
            # Example by example, so that none depends on its neighbours.
            return jtu.tree_map(lambda x, y: jnp.where(failed, x, y), other, value)

        # Of the whole batch: with a batched predicate JAX would run both branches.
        value = lax.cond(unvmap_any(failed), fall_back, lambda: value)
        return value, result, stats
