from typing import ClassVar

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, ScalarLike

from .._internal.checks import check_integer, check_number, FRACTION, integer
from .._internal.pytree import working_dtype
from .._internal.types import LinearSolution, Options, Product
from .matrix_free import AbstractMatrixFreeSolver


class NeumannSeries(AbstractMatrixFreeSolver):
    r"""The first terms of the Neumann series of a linear system's solution.

    The operator is $A = J - I$, as in an implicit adjoint. With
    $\lambda = 1 - \text{damping}$,

    $$A^{-1} b = -\lambda \sum_{i=0}^{\infty}
    \big(\lambda J + (1 - \lambda) I\big)^i b$$

    if the matrix in brackets contracts. The solver sums the first `num_terms` terms, by
    `num_terms - 1` products and in the memory of two vectors. At an equilibrium they
    give the gradient of [`implicitnets.PhantomAdjoint`][] with as many steps.

    The number of terms is fixed and the result always successful, whatever the
    residual: the series is not meant to solve the system but to give a direction of
    bounded size. That makes it a good `fallback` for
    [`implicitnets.ImplicitAdjoint`][]. Only for real square operators. The statistics
    have `num_steps`, the number of products.

    Geng et al., *On Training Implicit Models*, 2021, equation 8 (the "Neumann-series
    based phantom gradient").

    **Arguments:**

    - `num_terms`: how many terms. One term is $-\lambda b$.
    - `damping`: the weight of the identity; 0 for none.
    """

    _options: ClassVar[tuple[str, ...]] = ()
    # Its `num_steps` is the number of products with the operator.
    counts_products: ClassVar[bool] = True

    num_terms: int = integer(5)
    damping: ScalarLike = 0.0

    def __check_init__(self):
        check_integer(self, "num_terms", self.num_terms, 1)
        check_number(self, "damping", self.damping, FRACTION)

    def _solve(
        self, product: Product, vector: PyTree[Array], options: Options
    ) -> LinearSolution:
        del options
        weight = 1 - jnp.asarray(self.damping, working_dtype(vector))

        # The sum as a damped iteration, which keeps one vector and not two.
        def add_term(_, u):
            return jtu.tree_map(
                lambda u, p, b: u + weight * (p - b), u, product(u), vector
            )

        first = jtu.tree_map(lambda b: -weight * b, vector)
        solution = lax.fori_loop(1, self.num_terms, add_term, first)
        stats = {"num_steps": jnp.array(self.num_terms - 1)}
        return solution, lx.RESULTS.successful, stats
