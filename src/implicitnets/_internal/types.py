"""The types in the methods of Optimistix's, Lineax's and Diffrax's solvers."""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING, TypeAlias

import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real, Scalar


Fn: TypeAlias = Callable[[PyTree[Array], Any], tuple[PyTree[Array], Any]]
Norm: TypeAlias = Callable[[PyTree[Array]], Scalar]
Options: TypeAlias = dict[str, Any]
Stats: TypeAlias = dict[str, Any]
Tags: TypeAlias = frozenset[object]
Product: TypeAlias = Callable[[PyTree[Array]], PyTree[Array]]
# What a Lineax solver returns: the solution, the result and the statistics.
LinearSolution: TypeAlias = tuple[PyTree[Array], lx.RESULTS, Stats]

# As in Diffrax. A time may be a Python number.
if TYPE_CHECKING:
    BoolScalarLike: TypeAlias = bool | Array | np.ndarray
    RealScalarLike: TypeAlias = float | Array | np.ndarray
else:
    BoolScalarLike: TypeAlias = Bool[ArrayLike, ""]
    RealScalarLike: TypeAlias = Real[ArrayLike, ""]
