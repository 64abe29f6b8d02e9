from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._loop import while_loop


_Tree = TypeVar("_Tree", bound=PyTree[Array])


def detach(tree: PyTree) -> PyTree:
    """Stop the gradient of everything in a pytree that could have one.

    **Arguments:**

    - `tree`: any pytree.

    **Returns:**

    The same pytree, without derivatives.
    """
    return jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree
    )


def detached_solve(primal_fn: Callable, inputs: PyTree) -> tuple[PyTree[Array], Any]:
    """Solve, without differentiating the solve.

    **Arguments:**

    - `primal_fn`, `inputs`: as those of `optimistix.AbstractAdjoint.apply`.

    **Returns:**

    The root, and what comes with it.
    """
    return jtu.tree_map(jnp.asarray, primal_fn(detach(inputs) + (while_loop,)))


@jax.custom_jvp
def substitute(surrogate: _Tree, value: _Tree) -> _Tree:
    """A value, with the derivatives of something else.

    Unlike adding a difference that is zero, this is exact, also where the surrogate is
    not finite.

    **Arguments:**

    - `surrogate`: what to differentiate.
    - `value`: the value, whose own derivatives are dropped.

    **Returns:**

    `value`.
    """
    del surrogate
    return value


@substitute.defjvp
def _substitute_jvp(primals, tangents):
    surrogate, value = primals
    t_surrogate, _ = tangents
    return substitute(surrogate, value), t_surrogate
