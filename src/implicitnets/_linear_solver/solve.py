from typing import Any

import jax
import lineax as lx
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .._internal.manual import vary_like
from .._internal.pytree import tree_all_finite
from .._internal.types import LinearSolution, Product


def linear_operator(
    product: Product, like: PyTree[Array], tags: frozenset[object] = frozenset()
) -> lx.AbstractLinearOperator:
    """A square operator that is not traced until it is used.

    **Arguments:**

    - `product`: a linear function.
    - `like`: a vector, for the structure, shapes and dtypes.
    - `tags`: Lineax' tags of the operator.

    **Returns:**

    The operator.
    """
    # Lineax traces a function at structures without the axes over which arrays vary in
    # `jax.shard_map`, which JAX then does not know again.
    return lx.FunctionLinearOperator(
        lambda vector: product(vary_like(vector, like)),
        jax.eval_shape(lambda: like),
        tags,
        closure_convert=False,
    )


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
