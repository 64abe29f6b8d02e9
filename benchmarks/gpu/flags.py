"""What XLA's CUDA graphs change for solves, whose loops have small steps."""

from .programs import (
    ADJOINTS,
    ANDERSON,
    gradient_program,
    IMPLICIT,
    solve_program,
    SOLVERS,
)
from .record import Record, Row
from .solves import Bench, GRADIENT, SOLVE
from .timing import compile_all, Job, milliseconds, said


GRAPHS = "xla_gpu_enable_command_buffer"
SMALLEST = "xla_gpu_graph_min_graph_size"
KERNELS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"

# Options of XLA by what they mean; they are also flags of `XLA_FLAGS`.
OPTIONS: dict[str, dict[str, str | int]] = {
    "default": {},
    "no CUDA graphs": {GRAPHS: ""},
    "CUDA graphs of any size": {GRAPHS: KERNELS, SMALLEST: 1},
    "CUDA graphs with loops": {GRAPHS: f"{KERNELS},CONDITIONAL,WHILE", SMALLEST: 1},
}
METHODS = ("FixedPointIteration", ANDERSON)


def measure_flags(record: Record, bench: Bench) -> None:
    """Add the rows of solves and a gradient, compiled with different options."""
    case = bench.case
    solve_arguments = (case.weights, case.inputs, bench.norms)
    arguments = (case.weights, case.inputs, case.cotangent)
    jobs: dict[tuple[str, str, str], Job] = {}
    for meaning, options in OPTIONS.items():
        for name in METHODS:
            program = solve_program(case, SOLVERS[name])
            jobs[meaning, name, SOLVE] = Job(program, solve_arguments, None, options)
        program = gradient_program(case, ADJOINTS[IMPLICIT])
        jobs[meaning, IMPLICIT, GRADIENT] = Job(program, arguments, None, options)
    for (meaning, name, what), program in compile_all(jobs).items():
        record.check_time()
        row: Row = {**bench.head, "options": meaning, "method": name}
        try:
            if isinstance(program, Exception):
                raise program
            found = program()
            if what == SOLVE:
                row["residual"] = float(bench.residuals(found[0]).max())
            row[what] = milliseconds(program)
        except Exception as error:
            row["result"] = said(error)
        record.add("flags", row)
