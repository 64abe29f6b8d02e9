import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import ScalarLike

from .._internal.checks import check_integer, check_number
from .._internal.pytree import tree_astype, tree_cast_like, working_dtype
from .matrix_free import AbstractMatrixFreeSolver


class NeumannSeries(AbstractMatrixFreeSolver):
    r"""The first terms of the Neumann series of a linear system's solution.

    The operator is taken as $A = J - I$, that of an implicit adjoint, for which with
    $\lambda = 1 - \text{damping}$

    $$A^{-1} b = -\lambda \sum_{i=0}^{\infty}
    \big(\lambda J + (1 - \lambda) I\big)^i b$$

    if the matrix in brackets contracts. The first `num_terms` terms take one product
    less, and two vectors of memory. At an equilibrium the gradient they give is that of
    [`implicitnets.PhantomAdjoint`][] with as many steps.

    A fixed count of terms, whatever the residual, so the result is always successful:
    what is asked for is not the solution but a direction of bounded size, which makes
    this the `fallback` of choice in [`implicitnets.ImplicitAdjoint`][]. Only for real
    square operators. The statistics have `num_steps`, the number of products.

    Geng et al., *On Training Implicit Models*, 2021, equation 8 (the "Neumann-series
    based phantom gradient").

    **Arguments:**

    - `num_terms`: how many terms. One term is $-\lambda b$.
    - `damping`: the weight of the identity: 0 for none.
    """

    num_terms: int = 5
    damping: ScalarLike = 0.0

    def __check_init__(self):
        check_integer(self, "num_terms", 1)
        check_number(self, "damping", lambda x: 0 <= x < 1, "in the interval [0, 1)")

    def _solve(self, operator, vector, options):
        del options
        dtype = working_dtype(vector)
        weight = 1 - jnp.asarray(self.damping, dtype)
        b = tree_astype(vector, dtype)

        # The sum as a damped iteration, which keeps one vector and not two.
        def add_term(_, u):
            product = tree_astype(operator.mv(tree_cast_like(u, vector)), dtype)
            return jtu.tree_map(lambda u, p, b: u + weight * (p - b), u, product, b)

        first = jtu.tree_map(lambda b: -weight * b, b)
        solution = lax.fori_loop(1, self.num_terms, add_term, first)
        stats = {"num_steps": jnp.array(self.num_terms - 1)}
        return tree_cast_like(solution, vector), lx.RESULTS.successful, stats
