"""The types in the methods of Optimistix's, Lineax's and Diffrax's solvers."""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING, TypeAlias

import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real, Scalar


Y: TypeAlias = PyTree[Array]
Aux: TypeAlias = Any
Fn: TypeAlias = Callable[[Y, Any], tuple[Y, Aux]]
Norm: TypeAlias = Callable[[Y], Scalar]
Options: TypeAlias = dict[str, Any]
Stats: TypeAlias = dict[str, Any]
Tags: TypeAlias = frozenset[object]
Product: TypeAlias = Callable[[PyTree[Array]], PyTree[Array]]
# Whatever Optimistix finds a fixed point by.
Solver: TypeAlias = (
    optx.AbstractFixedPointSolver
    | optx.AbstractRootFinder
    | optx.AbstractLeastSquaresSolver
    | optx.AbstractMinimiser
)
# What a Lineax solver returns: the solution, the result and the statistics.
LinearSolution: TypeAlias = tuple[PyTree[Array], lx.RESULTS, Stats]

# What `terminate` and `postprocess` return.
Verdict: TypeAlias = tuple[Bool[Array, ""], optx.RESULTS]
Answer: TypeAlias = tuple[Y, Aux, Stats]

# As in Diffrax. A time may be a Python number.
if TYPE_CHECKING:
    BoolScalarLike: TypeAlias = bool | Array | np.ndarray
    RealScalarLike: TypeAlias = float | Array | np.ndarray
else:
    BoolScalarLike: TypeAlias = Bool[ArrayLike, ""]
    RealScalarLike: TypeAlias = Real[ArrayLike, ""]
