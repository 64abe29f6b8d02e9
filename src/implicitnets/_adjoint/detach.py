from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._internal.optimistix import SolveOutputs


_AUX_MESSAGE = (
    "The auxiliary output of a solve, `sol.aux`, has no gradient under this adjoint. "
    "Evaluate the function again at `sol.value` to differentiate it; or, if it is not "
    "to be differentiated, use `jax.lax.stop_gradient(sol.aux)`."
)

_Tree = TypeVar("_Tree", bound=PyTree[Array])


def detach(tree: PyTree) -> PyTree:
    """Stop the gradient of everything in a pytree that could have one."""
    return jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree
    )


def close_aux(found: Any, inputs: PyTree) -> Any:
    """Make reverse-mode differentiation of a function's auxiliary output an error."""
    # No adjoint knows this derivative: it would be zero without a word.
    if found is None:
        return None
    found = SolveOutputs(*found)
    leaves = [x for x in jtu.tree_leaves(inputs) if eqx.is_inexact_array(x)]

    def close(x):
        if not eqx.is_inexact_array(x):
            return x
        # To depend on every input, at no cost: by the sum of none of its elements.
        zeros = (jnp.sum(jnp.ravel(leaf)[:0]).astype(x.dtype) for leaf in leaves)
        return eqxi.nondifferentiable_backward(sum(zeros, start=x), msg=_AUX_MESSAGE)

    return found._replace(aux=jtu.tree_map(close, found.aux))


@jax.custom_jvp
def substitute(surrogate: _Tree, value: _Tree) -> _Tree:
    """The value, with the derivatives of the surrogate in place of its own."""
    # Unlike `value + (surrogate - stop_gradient(surrogate))` this is exact, also where
    # the surrogate is not finite.
    del surrogate
    return value


@substitute.defjvp
def _substitute_jvp(primals, tangents):
    surrogate, value = primals
    t_surrogate, _ = tangents
    return substitute(surrogate, value), t_surrogate
