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


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """The programs of a whole run take some gigabytes of each process."""
    yield
    jax.clear_caches()
