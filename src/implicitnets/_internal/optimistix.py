"""What an adjoint is given by Optimistix, and returns to it, by name.

Optimistix passes both as bare tuples (`optimistix/_iterate.py`, version 0.1.0). Nothing
else here counts their elements.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .loop import while_loop
from .types import Fn, Options, Stats, Tags


class SolveInputs(NamedTuple):
    """The `inputs` of `optimistix.AbstractAdjoint.apply`, which are those of a solve.

    **Attributes:**

    - `fn`: the function, `fn(y, args) -> (f, aux)`. In a fixed-point solve `f` is the
        next state, in a root find the residual, whatever the problem was before
        Optimistix translated it for the solver; in a minimisation or least-squares
        problem `aux` is a pair of the residual and the function's own.
    - `solver`, `y0`, `args`, `options`, `max_steps`, `tags`: those of the solve.
    - `f_struct`, `aux_struct`: what `fn` returns.
    """

    fn: Fn
    solver: Any
    y0: PyTree[Array]
    args: Any
    options: Options
    max_steps: int | None
    f_struct: PyTree
    aux_struct: PyTree
    tags: Tags


class SolveOutputs(NamedTuple):
    """What a solve, and so an adjoint, returns beside the root.

    **Attributes:**

    - `num_steps`, `result`, `aux`, `stats`: those of the `optimistix.Solution`.
    - `state`: the solver's final state; its arrays, and `None` for everything else.
    - `static_state`: everything else, wrapped.
    """

    num_steps: Array
    result: Any
    state: PyTree
    static_state: Any
    aux: PyTree
    stats: Stats


def solve_inputs(inputs: tuple) -> SolveInputs:
    """A solve's inputs by name, without what an adjoint has appended to them."""
    return SolveInputs(*inputs[: len(SolveInputs._fields)])


def replace_inputs(inputs: tuple, **changes: Any) -> tuple:
    """A solve's inputs, some of them replaced, with what was appended to them."""
    return (
        *solve_inputs(inputs)._replace(**changes),
        *inputs[len(SolveInputs._fields) :],
    )


def run_solve(primal_fn: Callable, inputs: PyTree) -> tuple[PyTree[Array], Any]:
    """Make the solve that an adjoint is given, in our loop."""
    dtypes = {getattr(x, "dtype", None) for x in jtu.tree_leaves(inputs)}
    is_double = jnp.dtype(jnp.float64) in dtypes
    loop = while_loop if is_double else _single_precision_loop
    return jtu.tree_map(jnp.asarray, primal_fn(inputs + (loop,)))


def _single_precision_loop(cond_fun, body_fun, init_val, **kwargs):
    # The states of Dogleg and Levenberg-Marquardt start with constants, of float64
    # where that is on, and branches on them then have two types (`optimistix/_solver`,
    # version 0.1.0; as https://github.com/patrick-kidger/optimistix/issues/207).
    init_val = jtu.tree_map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x,
        jtu.tree_map(jnp.asarray, init_val),
    )
    return while_loop(cond_fun, body_fun, init_val, **kwargs)
