import importlib.metadata
import os


# Compiling is most of the time of the tests, and these two halve it: without LLVM's
# optimisations, and without XLA's fusion emitters on CPU. A flag that XLA does not know
# ends the process, and later versions do not know the second one. Before JAX starts,
# and for the processes that tests start.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
    )
)

import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A compilation cache of the user's would hide what a test compiles.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_modifyitems(config, items):
    """Run what is marked as independent of the precision in float32 only."""
    if jax.config.jax_enable_x64:
        once = [item for item in items if item.get_closest_marker("one_precision")]
        config.hook.pytest_deselected(items=once)
        items[:] = [item for item in items if item not in set(once)]


@pytest.fixture
def getkey():
    """A source of fresh keys, the same ones in every run of a test."""
    return eqxi.GetKey(seed=0)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """The programs of a whole run take some gigabytes of each process."""
    yield
    jax.clear_caches()
