from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .._internal.manual import is_manual, vary_like, vary_over, varying_axes
from .._internal.pytree import tree_all_finite
from .._internal.types import LinearSolution, Product, Tags


class _ManualOperator(lx.AbstractLinearOperator):
    """As `lx.FunctionLinearOperator`, square, in `jax.shard_map`.

    That one is traced at structures without the axes over which arrays vary, which JAX
    then does not know again (Lineax 0.1.1, `_operator.py`).
    """

    fn: Product
    # Flat, so that it can be hashed.
    structure: tuple[tuple[jax.ShapeDtypeStruct, ...], Any] = eqx.field(static=True)
    axes: frozenset[str] = eqx.field(static=True)
    tags: Tags = eqx.field(static=True)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        return self.fn(vary_over(vector, self.axes))

    def as_matrix(self) -> Array:
        zeros, unravel = ravel_pytree(self._zeros())

        def column(unit):
            return ravel_pytree(self.mv(unravel(unit)))[0]

        return jax.vmap(column, out_axes=1)(jnp.eye(zeros.size, dtype=zeros.dtype))

    def transpose(self) -> "_ManualOperator":
        transpose_fn = jax.linear_transpose(
            self.fn, vary_over(self._zeros(), self.axes)
        )
        return _ManualOperator(
            lambda vector: transpose_fn(vector)[0],
            self.structure,
            self.axes,
            lx.transpose_tags(self.tags),
        )

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        leaves, treedef = self.structure
        return jtu.tree_unflatten(treedef, leaves)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.in_structure()

    def _zeros(self) -> PyTree[Array]:
        structure = self.in_structure()
        return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structure)


lx.linearise.register(_ManualOperator)(lambda operator: operator)
lx.conj.register(_ManualOperator)(lambda operator: operator)
for _check, _tag in (
    (lx.is_symmetric, lx.symmetric_tag),
    (lx.is_diagonal, lx.diagonal_tag),
    (lx.is_tridiagonal, lx.tridiagonal_tag),
    (lx.has_unit_diagonal, lx.unit_diagonal_tag),
    (lx.is_lower_triangular, lx.lower_triangular_tag),
    (lx.is_upper_triangular, lx.upper_triangular_tag),
    (lx.is_positive_semidefinite, lx.positive_semidefinite_tag),
    (lx.is_negative_semidefinite, lx.negative_semidefinite_tag),
):
    _check.register(_ManualOperator)(lambda operator, tag=_tag: tag in operator.tags)


def linear_operator(
    product: Product, like: PyTree[Array], tags: Tags = frozenset()
) -> lx.AbstractLinearOperator:
    """The square operator of a linear function of vectors like another."""
    structure = jax.eval_shape(lambda: like)
    if not is_manual():
        return lx.FunctionLinearOperator(product, structure, tags)
    leaves, treedef = jtu.tree_flatten(structure)
    axes = varying_axes(like)
    return _ManualOperator(product, (tuple(leaves), treedef), axes, tags)


def run_linear_solver(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    solver: lx.AbstractLinearSolver,
    options: dict[str, Any] | None = None,
) -> LinearSolution:
    """As `lx.linear_solve(..., throw=False)`, where nothing is differentiated.

    That binds a primitive, to have derivatives, whose types are without the axes of
    `jax.shard_map` (Lineax 0.1.1, `_solve.py`).

    **Arguments:**

    - `operator`, `vector`, `solver`, `options`: as those of `lineax.linear_solve`.

    **Returns:**

    The solution, the result and the statistics.
    """
    options = {} if options is None else options
    state = solver.init(operator, options)
    value, result, stats = solver.compute(state, vector, options)
    value = vary_like(value, vector)
    successful = result == lx.RESULTS.successful
    if not isinstance(successful, Tracer):
        # Of a solver that never fails. As an array it would be a constant within
        # `custom_linear_solve`, whose type JAX forgets in `jax.shard_map`.
        successful = bool(successful)
    spoilt = successful & ~tree_all_finite(value)
    return value, lx.RESULTS.where(spoilt, lx.RESULTS.singular, result), stats
