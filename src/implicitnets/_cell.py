"""How the layers call a cell, and what they ask of it."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from ._internal.arguments import CellArguments
from ._internal.checks import check_part, Part
from ._internal.convolution import fast_convolutions


# A module-level function, so that a solve outside `jit` is compiled once and not at
# every call.
def call_cell(z: PyTree[Array], arguments: CellArguments) -> PyTree[Array]:
    cell, x, key = arguments
    if key is None or not takes_key(cell):
        return fast_convolutions(cell)(z, x)
    return fast_convolutions(lambda z, x: cell(z, x, key=key))(z, x)


def takes_key(cell: Callable) -> bool:
    """Whether a cell or a layer has an argument `key`."""
    try:
        return "key" in inspect.signature(cell).parameters
    except ValueError:  # Built-in functions may have no signature.
        return False


def cell_residual(z: PyTree[Array], arguments: CellArguments) -> PyTree[Array]:
    """How far a state is from an equilibrium: the next state minus this one."""
    return jtu.tree_map(jnp.subtract, call_cell(z, arguments), z)


def make_zeros(
    zero_state: Callable[[Any], PyTree[ArrayLike]] | None, x: PyTree
) -> PyTree[ArrayLike]:
    """A layer's zero state for an input."""
    if zero_state is not None:
        return zero_state(x)
    # What is no array is left to `checked_state` to refuse.
    return jtu.tree_map(lambda v: jnp.zeros_like(v) if eqx.is_array_like(v) else v, x)


def check_starts(layer: Any) -> None:
    """Check the functions of a layer that say where it starts."""
    check_part(layer, "init", layer.init, _START_FUNCTION, optional=True)
    check_part(layer, "zero_state", layer.zero_state, _START_FUNCTION, optional=True)


_START_FUNCTION = Part(
    "a function of the input",
    Callable,
    {
        jax.Array | np.ndarray: (
            "An array is for a call: `layer(x, z0=...)`, or "
            "`init=lambda x: ...` for the same start every time."
        )
    },
)


def checked_state(
    z: PyTree, arguments: CellArguments, *, alternative: str | None = None
) -> PyTree[Array]:
    """A state as arrays of the cell's dtypes, if the cell maps it to one like it.

    Given an `alternative`, a cell that couples examples is refused, and told of it.
    """
    name = cell_name(arguments.cell)
    leaves = jtu.tree_leaves(z)
    if not leaves or not all(map(_is_real, leaves)):
        raise ValueError(
            f"`{name}(z, x)` needs a state `z` of real floating-point arrays; got `z` "
            f"of structure {_describe(z)} for `x` of structure "
            f"{_describe(arguments.x)}. Split complex numbers into real and imaginary "
            f"parts. {_START}"
        )
    z = jtu.tree_map(jnp.asarray, z)
    z_struct = jax.eval_shape(lambda: z)
    try:
        jaxpr, *new_z = eqx.filter_make_jaxpr(call_cell)(z, arguments)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}(z, x)` fails for `z` of structure {_describe(z_struct)} and `x` "
            f"of structure {_describe(arguments.x)}. {_START} The error: "
            f"{type(error).__name__}: {error}"
        ) from error
    new_z = eqx.combine(*new_z)
    if jtu.tree_structure(z) == jtu.tree_structure(new_z):
        # A Python number has no dtype of its own.
        z = jtu.tree_map(
            lambda x, new: jnp.asarray(x, (new if x.weak_type else x).dtype), z, new_z
        )
    if _strip(z) != _strip(new_z):
        raise ValueError(
            f"`{name}(z, x)` must return the structure, shapes and dtypes of `z`; got "
            f"`z` of structure {_describe(z_struct)} and `{name}(z, x)` of structure "
            f"{_describe(new_z)}. {_START}"
        )
    if alternative is not None:
        refuse_coupling(name, jaxpr, alternative)
    return z


def cell_name(cell: Callable) -> str:
    return getattr(cell, "__name__", type(cell).__name__)


def refuse_coupling(name: str, jaxpr: jec.ClosedJaxpr, alternative: str) -> None:
    """Refuse a cell, by its jaxpr, that communicates over an axis of `jax.vmap`."""
    # Those of `jax.shard_map` couple nothing that a solve takes apart: every device
    # has a part of one state, or states of its own.
    manual_axes = jax.sharding.get_abstract_mesh().manual_axes
    axes = {
        effect.name  # pyright: ignore[reportAttributeAccessIssue]
        for effect in jaxpr.effects
        if type(effect).__name__ == "NamedAxisEffect"
    }
    axes = sorted(map(repr, (axes | _silent_axes(jaxpr.jaxpr)) - {*manual_axes}))
    if axes:
        raise ValueError(
            f"`{name}(z, x)` communicates over the axis {', '.join(axes)} of "
            "`jax.vmap`, as batch normalisation does. That couples the examples, and "
            "each would be solved as if it were alone. Solve them as one system: on "
            "the whole batch, by a cell that has the `jax.vmap` within. " + alternative
        )


def _silent_axes(jaxpr: jec.Jaxpr) -> set[Any]:
    """The axes of the collectives that have no effect in JAX 0.10 to 0.12."""
    axes = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("ppermute", "pbroadcast"):
            names = equation.params["axis_name"]
            axes |= {*names} if isinstance(names, tuple) else {names}
        own_axes = equation.params.get("manual_axes", ())
        for inner in jec.jaxprs_in_params(equation.params):
            axes |= _silent_axes(inner) - {*own_axes}
    # In a batch of several axes some are positions.
    return {axis for axis in axes if not isinstance(axis, int)}


_START = (
    "The state starts as zeros like `x` unless `zero_state`, `init` or `z0` says "
    "otherwise."
)


def _is_real(leaf: Any) -> bool:
    if isinstance(leaf, bool | complex) or not eqx.is_array_like(leaf):
        return False
    # A Python number takes the dtype of what the cell makes of it.
    is_number = isinstance(leaf, int | float) or getattr(leaf, "weak_type", False)
    return is_number or jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating)


def _describe(tree: PyTree) -> str:
    return eqx.tree_pformat(tree, struct_as_array=True)


def _strip(structure: PyTree) -> tuple:
    leaves, treedef = jtu.tree_flatten(structure)
    # A cell may return what is no array.
    shapes = [(getattr(x, "shape", x), getattr(x, "dtype", None)) for x in leaves]
    return treedef, shapes
