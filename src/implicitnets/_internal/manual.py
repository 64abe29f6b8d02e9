"""What JAX asks of the types of arrays on several devices.

In `jax.shard_map` every type says over which axes of the mesh the array varies
(`check_vma`, the default). What is made of constants varies over none, and JAX asks for
one type where arrays meet in a loop or in a branch. On a mesh with explicit axes a type
says which mesh the array is on, and constants are on none.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.tree_util as jtu
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array


_Carry = TypeVar("_Carry")
_Out = TypeVar("_Out")


def out_type(fn: Callable[..., Array], *avals: Any) -> Any:
    """The type of a function's value, over the axes of all meshes, too.

    It is the abstract evaluation of a primitive that stands for the function.
    """
    structs = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type
        )
        for x in avals
    ]
    (aval,) = jax.make_jaxpr(fn)(*structs).out_avals
    return aval


def is_manual() -> bool:
    """Whether this is traced within `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes over which any array, or structure, of some pytrees varies."""
    return frozenset().union(*(_axes(x) for x in jtu.tree_leaves(trees)))


def vary_over(tree: _Out, axes: frozenset[str]) -> _Out:
    """The same pytree, whose arrays vary over some axes, too."""

    def vary(x):
        missing = axes - _axes(x)
        if not missing or not eqx.is_array(x):
            return x
        return lax.pcast(x, tuple(missing), to="varying")

    return jtu.tree_map(vary, tree)


def vary_like(tree: _Out, *others: Any) -> _Out:
    """The same pytree, whose arrays vary over the axes over which some others do."""
    return vary_over(tree, varying_axes(others)) if is_manual() else tree


def vary_as_next(body_fun: Callable[[_Carry], _Carry], init_val: _Carry) -> _Carry:
    """The first carry of a loop, of the type that its next ones have.

    **Arguments:**

    - `body_fun`, `init_val`: as `jax.lax.while_loop`.

    **Returns:**

    The same carry.
    """
    init_val = _on_mesh(init_val)
    while is_manual():
        next_val = jax.eval_shape(body_fun, init_val)
        old = jtu.tree_map(_axes, init_val)
        init_val = jtu.tree_map(
            lambda x, new: vary_over(x, _axes(new)), init_val, next_val
        )
        if jtu.tree_map(_axes, init_val) == old:
            break
    return init_val


def _on_mesh(tree: _Out) -> _Out:
    """The same pytree, whose constants are on the mesh of `jax.set_mesh`, too."""
    # `jax.vmap` over an explicit axis of the mesh makes no batch of them where they
    # start a loop: "Resource axis: ... not found in mesh: ()" (JAX 0.10 to 0.12).
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return tree
    return jtu.tree_map(
        lambda x: (
            reshard(x, PartitionSpec()) if jax.typeof(x).sharding.mesh.empty else x
        ),
        tree,
    )


def _axes(x: Any) -> frozenset[str]:
    if isinstance(x, jax.Array):
        x = jax.typeof(x)
    kind = getattr(x, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying
