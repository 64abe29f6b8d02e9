"""What the tests of the trainer compare."""

import equinox as eqx
from jax.flatten_util import ravel_pytree


def without_times(records):
    """The records of two runs that are the same but for their speed."""
    times = ("seconds", "compile_seconds")
    return [{k: v for k, v in r.items() if k not in times} for r in records]


def weights(state):
    """All of a state in one vector."""
    return ravel_pytree(eqx.filter(state, eqx.is_array))[0]
