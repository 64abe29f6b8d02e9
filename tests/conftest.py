import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A compilation cache of the user's would hide what a test compiles.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def getkey():
    """A source of fresh keys, the same ones in every run of a test."""
    return eqxi.GetKey(seed=0)
