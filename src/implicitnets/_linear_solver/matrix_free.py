import abc

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.checks import check_options
from .._internal.pytree import tree_astype, tree_cast_like, working_dtype
from .._internal.types import LinearSolution, Options, Product


class AbstractMatrixFreeSolver(lx.AbstractLinearSolver):
    """A linear solver that asks nothing of its operator but products.

    Only for real square operators.
    """

    # The names of the options that it takes.
    _options: eqx.AbstractClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def _solve(
        self, product: Product, vector: PyTree[Array], options: Options
    ) -> LinearSolution:
        """Solve one system in the working dtype.

        **Arguments:**

        - `product`: the product with the operator.
        - `vector`: the right-hand side.
        - `options`: as `compute`, with the product with a preconditioner in its place.

        **Returns:**

        The solution, the result and the statistics.
        """

    def init(
        self, operator: lx.AbstractLinearOperator, options: Options
    ) -> lx.AbstractLinearOperator:
        check_options(self, options, *self._options)
        if operator.in_structure() != operator.out_structure():
            name = type(self).__name__
            raise ValueError(f"`{name}` is for square operators only.")
        return lx.linearise(operator)

    def compute(
        self,
        state: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        options: Options,
    ) -> LinearSolution:
        if any(jnp.iscomplexobj(x) for x in jtu.tree_leaves(vector)):
            raise ValueError(f"`{type(self).__name__}` is for real vectors only.")
        dtype = working_dtype(vector)

        def product_with(operator: lx.AbstractLinearOperator) -> Product:
            return lambda x: tree_astype(operator.mv(tree_cast_like(x, vector)), dtype)

        options = dict(options)
        if "y0" in options:
            options["y0"] = tree_astype(options["y0"], dtype)
        if "preconditioner" in options:
            options["preconditioner"] = product_with(options["preconditioner"])
        b = tree_astype(vector, dtype)
        value, result, stats = self._solve(product_with(state), b, options)
        return tree_cast_like(value, vector), result, stats

    def transpose(
        self, state: lx.AbstractLinearOperator, options: Options
    ) -> tuple[lx.AbstractLinearOperator, Options]:
        new_options = dict(options)
        # A start for one system is none for its transpose.
        new_options.pop("y0", None)
        if "preconditioner" in options:
            new_options["preconditioner"] = options["preconditioner"].transpose()
        return state.transpose(), new_options

    def conj(
        self, state: lx.AbstractLinearOperator, options: Options
    ) -> tuple[lx.AbstractLinearOperator, Options]:
        new_options = dict(options)
        if "preconditioner" in options:
            new_options["preconditioner"] = lx.conj(options["preconditioner"])
        return lx.conj(state), new_options

    def assume_full_rank(self) -> bool:
        return True
