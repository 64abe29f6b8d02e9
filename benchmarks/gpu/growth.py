"""How time and memory grow with the batch, and with the steps of a gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optimistix as optx

import implicitnets as inn

from .cases import Case, convolutional, dense
from .programs import ANDERSON, IMPLICIT
from .record import Record, Row
from .solves import GRADIENT, make_bench, measure, precision_name
from .timing import compile_all, Job, milliseconds, said


def grow_batch(record: Record, small: bool) -> None:
    """Solves and gradients of a dense cell, for more and more examples."""
    size, batches = (16, (1, 4)) if small else (256, (1, 8, 64, 512, 4096))
    for batch in batches:
        record.check_time()
        bench = make_bench(dense(batch, size), None)
        measure(record, bench, solvers=(ANDERSON,), adjoints=(IMPLICIT,), table="batch")


def gradient_of_steps(case: Case, kind: str, steps: int) -> Callable:
    """The gradient of a solve of just so many evaluations."""
    layer_options = {
        "implicit": {},
        "unrolled, checkpointed": {"adjoint": optx.RecursiveCheckpointAdjoint()},
        "unrolled": {"fixed_depth": steps},
    }

    def loss(weights, x, cotangent):
        layer = inn.DeepEquilibriumNetwork(
            case.cell_of(weights),
            optx.FixedPointIteration(0.0, 0.0),
            max_steps=steps,
            **layer_options[kind],
        )
        return jnp.sum(jax.vmap(layer)(x) * cotangent)

    return jax.grad(loss)


def grow_depth(record: Record, small: bool) -> None:
    """Memory and time of the gradient of a residual cell, for more and more steps."""
    case = convolutional(2, 8, 6) if small else convolutional(128, 64, 28)
    numbers = (2, 5) if small else (5, 20, 80, 200)
    arguments = (case.weights, case.inputs, case.cotangent)
    kinds = ("implicit", "unrolled, checkpointed", "unrolled")
    jobs = {
        (kind, steps): Job(gradient_of_steps(case, kind, steps), arguments)
        for steps in numbers
        for kind in kinds
    }
    for (kind, steps), program in compile_all(jobs).items():
        record.check_time()
        row: Row = {
            "problem": case.name,
            "precision": precision_name(None),
            "steps": steps,
            "gradient": kind,
        }
        if isinstance(program, Exception):
            record.add("depth", {**row, "result": said(program)})
            continue
        row["temporary (MB)"] = program.temporary_mb
        try:
            program()
            row[GRADIENT] = milliseconds(program)
        except Exception as error:
            row["result"] = said(error)
        record.add("depth", row)
