import equinox as eqx
from jaxtyping import ScalarLike

from .._linear_solver.neumann import NeumannSeries
from .implicit import ImplicitAdjoint
from .report import AbstractReportingAdjoint, AdjointReport


class NeumannAdjoint(AbstractReportingAdjoint):
    r"""Differentiate through the first terms of the Neumann series.

    The inverse in the derivative of a fixed point is that of $I - J$, which with
    $\lambda = 1 - \text{damping}$ is the sum of
    $\lambda (\lambda J + (1 - \lambda) I)^i$ over all $i$; this is the sum of the first
    `num_terms` (Geng et al., *On Training Implicit Models*, 2021, section 3.2). The
    same gradient as that of [`implicitnets.PhantomAdjoint`][] at a fixed point, in
    forward and reverse mode, from one linearisation. One term without damping is
    [`implicitnets.JacobianFreeAdjoint`][]. In a root-finding problem $F(z) = 0$ the
    fixed-point map is $F(z) + z$.

    The auxiliary output of the function, `sol.aux`, has no gradient: to differentiate
    it in reverse mode is an error that says so.

    **Bias:** the terms left out: a relative error of at most
    $\lVert \lambda J + (1 - \lambda) I \rVert^n$ for $n$ terms, where that norm is
    below one. Above one (which a spectral radius below one allows) it may be larger
    than with fewer terms.

    **Memory:** one evaluation of the function and two states, whatever the number of
    terms.

    **Cost:** `num_terms - 1` Jacobian products.

    **Arguments:**

    - `num_terms`: how many terms of the series.
    - `damping`: the weight of the identity, 0 for none: for maps with eigenvalues that
        are large and negative. The paper's `lambda` is `1 - damping`.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][].
    """

    num_terms: int = 5
    damping: ScalarLike = 0.0
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        self._series()

    def _series(self) -> NeumannSeries:
        return NeumannSeries(self.num_terms, self.damping)

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        adjoint = ImplicitAdjoint(self._series(), probe=self.probe)
        return adjoint.apply(primal_fn, rewrite_fn, inputs, tags)
