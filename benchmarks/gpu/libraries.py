"""Other libraries on the same device, with the settings of `benchmarks.peers`."""

import contextlib
import functools as ft
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from ..peers.libraries import LIBRARIES, Program
from .record import Record, Row
from .solves import Bench, GRADIENT, SOLVE
from .timing import milliseconds, said


# Of each library what is measured here, by the names in `benchmarks.peers`.
METHODS: dict[str, tuple[str, ...]] = {
    "implicitnets": ("Picard, Picard", "Anderson, Anderson", "Anderson, GMRES"),
    "torchdeq": ("fixed point", "Anderson", "Broyden"),
    "banax": ("Picard", "Anderson", "Broyden"),
    "jaxopt": ("fixed point", "Anderson"),
}


def measure_libraries(record: Record, bench: Bench) -> None:
    """Add the rows of every method of every library on one problem."""
    problem = bench.case.problem
    assert problem is not None
    norms = np.asarray(bench.norms)
    for library, names in METHODS.items():
        record.check_time()
        head: Row = {**bench.head, "library": library}
        make: Any = LIBRARIES[library][0]
        if library == "torchdeq":
            make = ft.partial(make, device=torch_device())
        try:
            methods = make(problem, norms)
        except ImportError as error:
            record.add("libraries", {**head, "result": f"not installed: {error}"})
            continue
        except Exception as error:
            record.add("libraries", {**head, "result": said(error)})
            continue
        programs = {name: methods[name]() for name in names}
        if library != "torchdeq":
            with ThreadPoolExecutor() as pool:
                list(pool.map(_compile, programs.values()))
        for name, program in programs.items():
            record.check_time()
            row = {**head, "method": name, **_measured(bench, program)}
            record.add("libraries", row)


def _compile(program: Program) -> None:
    # What fails here fails again when it is measured, and says so there.
    with contextlib.suppress(Exception):
        program.solve()
        program.gradient()


def _measured(bench: Bench, program: Program) -> Row:
    row: Row = {}
    try:
        z, counts = program.solve()
        z = z.cpu() if hasattr(z, "cpu") else z
        row["evaluations"] = int(np.max(counts["evaluations"]))
        row["residual"] = float(bench.residuals(z).max())
        row[SOLVE] = milliseconds(program.solve)
        program.gradient()
        row[GRADIENT] = milliseconds(program.gradient)
    except Exception as error:
        row["result"] = said(error)
    return row


def torch_device() -> str:
    """PyTorch's name of JAX' device, with products in TF32 where JAX has them."""
    if jax.default_backend() != "gpu":
        return "cpu"
    with contextlib.suppress(ImportError):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_float32_matmul_precision("high")
    return "cuda"
