"""The types in the methods of Optimistix' solvers."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, PyTree


Fn: TypeAlias = Callable[[PyTree[Array], Any], tuple[PyTree[Array], Any]]
Options: TypeAlias = dict[str, Any]
Stats: TypeAlias = dict[str, Any]
Tags: TypeAlias = frozenset[object]
