"""How the layers call a cell, and what they ask of it."""

import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._internal.convolution import fast_convolutions


# A module-level function, so that a solve outside `jit` is compiled once and not at
# every call.
def call_cell(z: PyTree[Array], arguments: tuple) -> PyTree[Array]:
    """One evaluation of a cell.

    **Arguments:**

    - `z`: the state.
    - `arguments`: a triple of the cell, the input, and the key or `None`.

    **Returns:**

    The next state.
    """
    cell, x, key = arguments
    if key is None or not takes_key(cell):
        return fast_convolutions(cell)(z, x)
    return fast_convolutions(lambda z, x: cell(z, x, key=key))(z, x)


def takes_key(cell: Callable) -> bool:
    """Whether a cell or a layer has an argument `key`.

    **Arguments:**

    - `cell`: any callable.

    **Returns:**

    Whether it has.
    """
    try:
        return "key" in inspect.signature(cell).parameters
    except ValueError:  # Built-in functions may have no signature.
        return False


def cell_residual(z: PyTree[Array], arguments: tuple) -> PyTree[Array]:
    """How far a state is from an equilibrium.

    **Arguments:**

    - `z`, `arguments`: as [`call_cell`][].

    **Returns:**

    The next state minus this one.
    """
    return jtu.tree_map(jnp.subtract, call_cell(z, arguments), z)


def check_state(z: PyTree[Array], arguments: tuple) -> None:
    """Check that a cell maps a state to one that looks like it.

    **Arguments:**

    - `z`, `arguments`: as [`call_cell`][].

    **Raises:**

    `ValueError` if it does not, or if the state is not real floating point.
    """
    for leaf in jtu.tree_leaves(z):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                "The state `z` must consist of real floating-point arrays; got an "
                f"array of dtype {leaf.dtype}. Split complex numbers into real and "
                "imaginary parts, and give the start of the state by `init` or `z0` if "
                "the input `x` has other leaves."
            )
    z_struct = jax.eval_shape(lambda: z)
    new_z = eqx.filter_eval_shape(call_cell, z, arguments)
    if _strip(z_struct) != _strip(new_z):
        raise ValueError(
            "`cell(z, x)` must return the structure, shapes and dtypes of `z`. Got `z` "
            f"of structure {eqx.tree_pformat(z_struct, struct_as_array=True)} and "
            "`cell(z, x)` of structure "
            f"{eqx.tree_pformat(new_z, struct_as_array=True)}. The state starts as "
            "zeros like `x` unless `init` or `z0` says otherwise."
        )


def _strip(structure):
    leaves, treedef = jtu.tree_flatten(structure)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]
