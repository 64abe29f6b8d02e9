import abc
from typing import Any, ClassVar

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.checks import check_options


class AbstractMatrixFreeSolver(lx.AbstractLinearSolver):
    """A linear solver that asks nothing of its operator but products.

    Only for real square operators.
    """

    # The names of those that it takes.
    _options: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def _solve(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Solve one system.

        **Arguments:**

        - `operator`: the operator, linearised.
        - `vector`: the right-hand side, real.
        - `options`: as `compute`.

        **Returns:**

        The solution, the result and the statistics.
        """

    def init(self, operator, options):
        check_options(self, options, *self._options)
        if operator.in_structure() != operator.out_structure():
            name = type(self).__name__
            raise ValueError(f"`{name}` is for square operators only.")
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        if any(jnp.iscomplexobj(x) for x in jtu.tree_leaves(vector)):
            raise ValueError(f"`{type(self).__name__}` is for real vectors only.")
        return self._solve(state, vector, options)

    def transpose(self, state, options):
        new_options = dict(options)
        # A start for one system is none for its transpose.
        new_options.pop("y0", None)
        if "preconditioner" in options:
            new_options["preconditioner"] = options["preconditioner"].transpose()
        return state.transpose(), new_options

    def conj(self, state, options):
        new_options = dict(options)
        if "preconditioner" in options:
            new_options["preconditioner"] = lx.conj(options["preconditioner"])
        return lx.conj(state), new_options

    def assume_full_rank(self):
        return True
