from typing import Any

import lineax as lx


_NAMES = (
    "max_steps_reached",
    "singular",
    "breakdown",
    "stagnation",
    "conlim",
    "nonfinite_input",
)


def promote(result: lx.RESULTS, kind: type[lx.RESULTS]) -> Any:
    """A linear solver's result as one of an enumeration that extends Lineax'."""
    # `kind.promote` looks it up in a constant array, which JAX 0.10 cannot do in
    # `jax.shard_map`.
    promoted: Any = kind.successful
    for name in _NAMES:
        is_name = result == getattr(lx.RESULTS, name)
        promoted = kind.where(is_name, getattr(kind, name), promoted)
    return promoted
