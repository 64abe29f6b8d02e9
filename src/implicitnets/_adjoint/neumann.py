from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree, ScalarLike

from .._internal.checks import check_integer, check_number, FRACTION, integer
from .._internal.types import Tags
from .._linear_solver.neumann import NeumannSeries
from .implicit import ImplicitAdjoint
from .report import AbstractReportingAdjoint, AdjointReport


class NeumannAdjoint(AbstractReportingAdjoint):
    r"""Differentiate through the first terms of the Neumann series.

    The derivative of a fixed point has the inverse of $I - J$, which with
    $\lambda = 1 - \text{damping}$ is the sum of
    $\lambda (\lambda J + (1 - \lambda) I)^i$ over all $i$. This adjoint takes the first
    `num_terms` of them (Geng et al., *On Training Implicit Models*, 2021, section 3.2).
    At a fixed point it gives the gradient of [`implicitnets.PhantomAdjoint`][], in
    forward and reverse mode, from one linearisation. One term without damping is
    [`implicitnets.JacobianFreeAdjoint`][]. In a root-finding problem $F(z) = 0$ the
    fixed-point map is $F(z) + z$.

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** the terms left out. Their relative size is at most
    $\lVert \lambda J + (1 - \lambda) I \rVert^n$ for $n$ terms if that norm is below
    one. If it is above one, which a spectral radius below one allows, more terms may
    make the error larger.

    **Memory:** one evaluation of the function and two states, whatever the number of
    terms.

    **Cost:** `num_terms - 1` Jacobian products.

    **Arguments:**

    - `num_terms`: how many terms of the series.
    - `damping`: the weight of the identity; 0 for none. For maps with large negative
        eigenvalues. The paper's `lambda` is `1 - damping`.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][].
    """

    num_terms: int = integer(5)
    damping: ScalarLike = 0.0
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_integer(self, "num_terms", self.num_terms, 1)
        check_number(self, "damping", self.damping, FRACTION)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        series = NeumannSeries(self.num_terms, self.damping)
        adjoint = ImplicitAdjoint(series, probe=self.probe)
        return adjoint.apply(primal_fn, rewrite_fn, inputs, tags)
