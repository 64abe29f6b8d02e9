from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import PRNGKeyArray, PyTree


class CellArguments(NamedTuple):
    """The `args` of a layer's solve: what a cell is called with besides the state.

    **Attributes:**

    - `cell`: the cell.
    - `x`: its input.
    - `key`: the call's key, the same in every evaluation; `None` for none.
    """

    cell: Callable
    x: PyTree
    key: PRNGKeyArray | None = None
