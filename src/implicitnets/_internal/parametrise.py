import abc
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


_Tree = TypeVar("_Tree")
_Layer = TypeVar("_Layer", bound=eqx.Module)

# Which modules to choose: by their type, or by a module's path, such as
# `"block.layers.0"`, and the module itself.
Filter: TypeAlias = type | tuple[type, ...] | Callable[[str, Any], bool]


class AbstractParametrisation(eqx.Module):
    """Stands in a layer for an array that is computed from other arrays.

    The other arrays are its leaves: what is trained, copied, serialised and averaged.
    To write your own, give a subclass fields and a `value`. See
    [`implicitnets.nn.resolve`][].
    """

    @abc.abstractmethod
    def value(self) -> Array:
        """The array that it stands for.

        **Returns:**

        An array. Parametrisations among its own fields are resolved before the call.
        """

    def __jax_array__(self) -> Array:
        raise _Unresolved(type(self).__name__)

    def __getattr__(self, name: str) -> Any:
        if hasattr(jax.Array, name):
            raise _Unresolved(type(self).__name__)
        raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`.")


# An `AttributeError` too, for those who ask with `hasattr` whether it is an array.
class _Unresolved(TypeError, AttributeError):
    def __init__(self, name: str):
        super().__init__(
            f"`{name}` stands for an array that is computed from others, and only an "
            "equilibrium layer computes it by itself. Anywhere else, resolve the layer "
            "that has it: `implicitnets.nn.resolve(layer)(x)`."
        )


def is_parametrisation(node: Any) -> bool:
    return isinstance(node, AbstractParametrisation)


def resolve(tree: PyTree) -> PyTree:
    """Replace every parametrisation by the array that it stands for.

    The equilibrium layers do so once at the start of a solve: once for all its steps
    and, under `vmap`, for the whole batch. Anywhere else call it yourself, where the
    model is differentiated: `inn.nn.resolve(cell)(z, x)`. A pytree without
    parametrisations comes back as it is.

    **Arguments:**

    - `tree`: any pytree: a cell, a layer, a whole model.

    **Returns:**

    The pytree with arrays only.
    """

    def resolve_node(node):
        if not is_parametrisation(node):
            return node
        # Its own fields first.
        inner = jtu.tree_map(
            resolve_node,
            node,
            is_leaf=lambda x: is_parametrisation(x) and x is not node,
        )
        return inner.value()

    return jtu.tree_map(resolve_node, tree, is_leaf=is_parametrisation)


def parametrise(
    tree: _Tree,
    filter: Filter,
    fn: Callable[[Any], AbstractParametrisation],
) -> _Tree:
    """Replace the weight of every chosen layer; a `ValueError` if none is chosen."""
    num_chosen = 0

    def visit(path: tuple, node: Any) -> Any:
        nonlocal num_chosen
        if is_parametrisation(node) or jtu.all_leaves([node]):
            return node
        children, treedef = jtu.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        node = jtu.tree_unflatten(
            treedef, [visit(path + key, child) for key, child in children]
        )
        if not (_has_weight(node) and _is_chosen(filter, path, node)):
            return node
        num_chosen += 1
        return replace_weight(node, fn(node))

    tree = visit((), tree)
    if num_chosen == 0:
        raise ValueError(f"`filter` chooses no layer with a weight; got {filter!r}.")
    return tree


def replace_weight(layer: _Layer, weight: Any) -> _Layer:
    return eqx.tree_at(
        lambda layer: layer.weight,
        layer,
        weight,
        is_leaf=lambda x: x is None or is_parametrisation(x),
    )


def _has_weight(node):
    if not isinstance(node, eqx.Module):
        return False
    weight: Any = getattr(node, "weight", None)
    if is_parametrisation(weight):
        return True
    return eqx.is_inexact_array(weight) and weight.ndim >= 2


def _is_chosen(filter, path, layer):
    if isinstance(filter, type | tuple):
        return isinstance(layer, filter)
    return filter(jtu.keystr(path, simple=True, separator="."), layer)
