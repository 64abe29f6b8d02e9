import gc
import importlib.metadata
import os
import resource

import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A compilation cache of the user's would hide what a test compiles.
jax.config.update("jax_enable_compilation_cache", False)


def runs_with_defaults(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "xla_defaults"


def pytest_configure(config):
    """Leave out XLA's optimisations, but for the tests of what they make of us.

    Compiling is most of the time of the tests, and this halves it: without LLVM's
    optimisations, and without XLA's fusion emitters on CPU. XLA reads the flags when
    JAX makes its first array, and so do the processes that tests start. A flag that it
    does not know ends the process, and later versions do not know the second one.
    """
    if runs_with_defaults(config):
        return
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    # Two devices, for the tests of what runs on several.
    flags.append("--xla_force_host_platform_device_count=2")
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_modifyitems(config, items):
    """Run only once what does not depend on the precision, or has XLA's defaults."""

    def is_left_out(item):
        once = item.get_closest_marker("one_precision") and jax.config.jax_enable_x64
        defaults = item.get_closest_marker("xla_defaults") is not None
        return once or defaults != runs_with_defaults(config)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish():
    """Collect garbage less often: Python spends a sixth of the tracing on it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def getkey():
    """A source of fresh keys, the same ones in every run of a test."""
    return eqxi.GetKey(seed=0)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Else the programs of a whole run would take some gigabytes of each process."""
    yield
    # In kilobytes on Linux, in bytes on macOS, where it clears after every module.
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3_000_000:
        jax.clear_caches()
