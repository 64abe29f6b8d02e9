"""How time and memory grow with the batch, and with the steps of a gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optimistix as optx

import implicitnets as inn

from .cases import Case, convolutional, dense
from .programs import (
    ADJOINTS,
    ANDERSON,
    evaluations_program,
    gradient_program,
    IMPLICIT,
    solve_program,
    SOLVERS,
)
from .record import Record, Row
from .solves import GRADIENT, precision_name
from .timing import compile_all, Job, milliseconds, said


EVALUATIONS = 40


def grow_batch(record: Record, small: bool) -> None:
    """A bare loop, a solve and a gradient of a dense cell, for more and more examples.

    The bare loop makes as many evaluations for every batch, about those of a solve.
    """
    size, batches = (16, (1, 4)) if small else (256, (1, 8, 64, 512, 4096))
    jobs: dict[tuple[str, int], Job] = {}
    for batch in batches:
        case = dense(batch, size)
        arguments = (case.weights, case.inputs, case.cotangent)
        norms = jnp.ones(batch)
        bare = evaluations_program(case, EVALUATIONS)
        solve = solve_program(case, SOLVERS[ANDERSON])
        gradient = gradient_program(case, ADJOINTS[IMPLICIT])
        jobs[f"bare loop of {EVALUATIONS}", batch] = Job(bare, arguments)
        jobs[ANDERSON, batch] = Job(solve, (case.weights, case.inputs, norms))
        jobs[f"{ANDERSON}, {IMPLICIT}", batch] = Job(gradient, arguments)
    for (method, batch), program in compile_all(jobs).items():
        record.check_time()
        row: Row = {
            "problem": f"dense, width {size}",
            "precision": precision_name(None),
            "examples": batch,
            "method": method,
        }
        try:
            if isinstance(program, Exception):
                raise program
            program()
            row["time (ms)"] = milliseconds(program)
            row["examples / s"] = 1e3 * batch / row["time (ms)"]
            row["temporary (MB)"] = program.temporary_mb
        except Exception as error:
            row["result"] = said(error)
        record.add("batch", row)


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
