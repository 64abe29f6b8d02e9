from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.pytree import tree_all_finite
from .._linear_solver.gmres import GivensGMRES
from .report import AbstractReportingAdjoint, AdjointReport
from .root import AbstractInversion, differentiate_root


class ImplicitAdjoint(AbstractReportingAdjoint):
    r"""Differentiate through the implicit function theorem.

    At a root $F(z^*, \theta) = 0$ the tangent of the root solves the linear system

    $$\frac{\partial F}{\partial z} \dot z
    = - \frac{\partial F}{\partial \theta} \dot\theta$$

    and reverse mode solves the transposed system, at a memory cost that does not depend
    on how many steps the forward solve took (Bai et al., *Deep Equilibrium Models*,
    2019, Theorem 1). Works in forward mode, in reverse mode and to any order, under
    `vmap` and `jit`, in every Optimistix solve. The program has no host callback, so
    that it exports to other platforms, and the backward pass never raises: a linear
    solve that did not converge gives the best that it found, or what the `fallback`
    makes of it. See [`implicitnets.AdjointReport`][] for how to know. A cotangent or a
    Jacobian that is not finite gives NaN.

    The right-hand side is scaled to unit norm before the linear solve and the solution
    scaled back, so that the relative error of a gradient does not depend on the scale
    of the loss, whatever the linear solver's absolute tolerance.

    The auxiliary output of the function, `sol.aux`, has no gradient: to differentiate
    it in reverse mode is an error that says so.

    **Bias:** none but the linear solver's residual and the forward solve's.

    **Memory:** one evaluation of the function and what the linear solver needs
    (`restart + 1` states by default), whatever the steps of the forward solve.

    **Cost:** as many Jacobian products as the linear solver takes. To `1e-4`, for
    random matrices of size 256 in `tanh` cells and, symmetric, in linear ones, a
    ResNet's cell, and a symmetric expansive matrix of size 50, with batches of 32:

    | spectral radius | .5 | .9 | .99 | .95 sym. | .99 sym. | ResNet | 1.2 sym. |
    |-----------------|----|----|-----|----------|----------|--------|----------|
    | **products**    |    |    |     |          |          |        |          |
    | GMRES, restart 10 | 15 | 60 | 117 | 32 | 86 | 8 | fails |
    | GMRES, restart 20 | 13 | 56 | 100 | 30 | 59 | 8 | 213 |
    | GMRES, restart 30 | 13 | 54 | 95 | 26 | 52 | 8 | 59 |
    | Anderson | 13 | 51 | 99 | 27 | 49 | 9 | fails |
    | plain iteration | 14 | 69 | 278 | 149 | 747 | 33 | fails |
    | **milliseconds** |    |    |     |          |          |        |          |
    | GMRES, restart 10 | 0.6 | 2.1 | 3.9 | 1.2 | 2.8 | 117 | fails |
    | GMRES, restart 20 | 0.7 | 2.5 | 4.1 | 1.4 | 2.4 | 134 | 2.8 |
    | GMRES, restart 30 | 0.9 | 2.9 | 4.8 | 1.4 | 2.5 | 148 | 1.1 |
    | Anderson | 0.6 | 2.1 | 3.7 | 1.1 | 1.8 | 127 | fails |
    | plain iteration | 0.4 | 1.8 | 6.7 | 3.3 | 16 | 316 | fails |
    | `lineax.GMRES` | 4.7 | 10 | 13 | 7.3 | 11 | 680 | 5.9 |

    (`python benchmarks/linear_solvers.py`, two CPU cores.) The default, restart 20, is
    never far from the best and the first of them not to fail. Anderson acceleration,
    by [`implicitnets.FixedPointLinearSolver`][], needs half of its memory at gradients
    two to seven times less accurate. For a map that expands take a longer restart.

    **Arguments:**

    - `linear_solver`: any Lineax solver for the linear systems. The default is
        [`implicitnets.GivensGMRES`][] to a relative residual of `1e-4`.
    - `fallback`: a Lineax solver for the systems on which `linear_solver` was not
        successful, or gave values that are not finite. Run only if some example of a
        batch needs it, and used for those examples. A cheap choice that cannot fail is
        [`implicitnets.NeumannSeries`][], which makes a phantom gradient of them. `None`
        to use what `linear_solver` gave.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][].
    """

    linear_solver: lx.AbstractLinearSolver = GivensGMRES(rtol=1e-4, atol=0.0)
    fallback: lx.AbstractLinearSolver | None = None
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
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
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del aux, transposed
        solution = lx.linear_solve(operator, vector, self.linear_solver, throw=False)
        value, result, stats = solution.value, solution.result, solution.stats
        if self.fallback is None:
            return value, result, stats
        fallback = self.fallback
        failed = (result != lx.RESULTS.successful) | ~tree_all_finite(value)

        def fall_back():
            other = lx.linear_solve(operator, vector, fallback, throw=False).value
            # By the example, so that none depends on its neighbours.
            return jtu.tree_map(lambda x, y: jnp.where(failed, x, y), other, value)

        value = lax.cond(eqxi.unvmap_any(failed), fall_back, lambda: value)
        return value, result, stats
