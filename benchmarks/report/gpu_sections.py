"""The sections of the page "Report on a GPU", and its headline."""

import functools as ft
from collections.abc import Callable

from matplotlib.figure import Figure

from ..gpu.programs import ANDERSON, IMPLICIT
from ..gpu.solves import GRADIENT, RATIO, SOLVE
from ..kit import figures
from ..kit.tables import distinct, pivot, Row, Tables
from .exhibits import every, Exhibit, Section
from .headline import number, span
from .page import Records


MEMORY = "temporary (MB)"
COMPILED = "compiled for an H100, dense 128 x 256"


def having(rows: list[Row], column: str) -> list[Row]:
    """The rows that have a value."""
    return [row for row in rows if row.get(column) is not None]


def in_one_column(row: Row) -> str:
    """Cell and precision: what rows of one problem have in common."""
    return f"{row['problem']}, {row['precision']}"


def with_ratio(rows: list[Row], *, time: str) -> list[Row]:
    """Times with those relative to the bare loop, by method and problem."""
    told = [
        {
            "method": row["method"],
            "problem": in_one_column(row),
            "told": f"{number(row[time])} ({number(row[RATIO])})",
        }
        for row in having(rows, time)
    ]
    return pivot(told, index=("method",), column="problem", value="told")


def ratios(rows: list[Row], *, time: str) -> Figure:
    """A mark for every method and problem."""
    told = [{**row, "problem": in_one_column(row)} for row in having(rows, time)]
    return figures.dots(
        told,
        label=("method",),
        values=(RATIO,),
        series=("problem",),
        unit=RATIO,
    )


def one_step(rows: list[Row], *, program: str) -> list[Row]:
    """Kernels and waits of the loops of a program, the inner ones told with theirs."""
    outer = [
        {**row, "loop of": f"{row['method']}, {row['loop']}"}
        for row in rows
        if row["program"] == program and "." not in row["loop"]
    ]
    index = ("method",) if program == "solve" else ("loop of",)
    return pivot(outer, index=index, column="cell", value="step")


def program_memory(rows: list[Row]) -> list[Row]:
    """The temporary memory of every program."""
    return pivot(rows, index=("program", "method"), column="cell", value=MEMORY)


PROGRAM = Section(
    "gpu_program",
    "Kernels and waits of a step",
    "What does a step launch on a GPU, and how often does it wait for the device? "
    "Counted in the programs that XLA compiles for an H100; none of it was measured. "
    "`7 + 1` is seven kernels and one wait, and a loop inside of it stands in "
    "brackets. The predicate of a loop is a wait, unless its length is known when "
    "compiling. Of the branches of a condition the one with the most kernels counts. "
    "On a device XLA also tries out kernels and may choose others.",
    (
        Exhibit(
            "gpu_program_solve",
            "A step of a solve; the bare loop has the cell and nothing else",
            ft.partial(one_step, program="solve"),
        ),
        Exhibit(
            "gpu_program_gradient",
            "The loops of a solve and its gradient, in their order. The last loops of "
            "the reversible adjoint are its fallback's, which runs only if needed",
            ft.partial(one_step, program="gradient"),
        ),
        Exhibit(
            "gpu_program_memory",
            "Temporary memory as compiled for the device (MB)",
            program_memory,
        ),
        Exhibit(
            "gpu_program_rows",
            "Every loop: what launches the kernels",
            every,
            folded=True,
        ),
    ),
    minutes=20,
    options=(),
    quick=("--cells", "dense", "--methods", ANDERSON),
)


def fold(name: str, table: str) -> Exhibit:
    """All rows of a table, those that failed or were stopped included."""
    return Exhibit(name, f"Every row ({table})", every, table_of=table, folded=True)


def library_times(rows: list[Row]) -> list[Row]:
    """Times of a solve and its gradient by library and problem."""
    return pivot(
        having(rows, "method"),
        index=("library", "method"),
        column="problem",
        value=GRADIENT,
    )


def curves(rows: list[Row], *, x: str, value: str, series: str) -> Figure:
    """Curves of what has a value, over logarithmic axes."""
    chosen = having(rows, value)
    return figures.curves(chosen, x=x, values=(value,), series=(series,), log="xy")


def growth(rows: list[Row]) -> list[Row]:
    """Solve and gradient in one column, a line for every method."""
    return [
        {**row, "time (ms)": row.get(SOLVE, row.get(GRADIENT))}
        for row in rows
        if SOLVE in row or GRADIENT in row
    ]


DEVICE = Section(
    "gpu",
    "Measured on a device",
    "What do solves, gradients and training take on the device that the table at the "
    "end names, next to a bare loop of as many evaluations of the cell and products "
    "with its Jacobian? Solves stop at a relative residual of 1e-3. *TF32* is JAX' "
    "default there for products of float32, *float32* its precision `highest`. "
    "Residuals and errors of gradients are relative, and computed in float32.",
    (
        Exhibit(
            "gpu_solve",
            "Time of a solve (ms), and in brackets relative to the bare loop",
            ft.partial(with_ratio, time=SOLVE),
            ft.partial(ratios, time=SOLVE),
            table_of="solvers",
            figure_of="solvers",
        ),
        Exhibit(
            "gpu_gradient",
            "Time of a solve and its gradient (ms), and in brackets relative to the "
            "bare loop",
            ft.partial(with_ratio, time=GRADIENT),
            ft.partial(ratios, time=GRADIENT),
            table_of="solvers",
            figure_of="solvers",
        ),
        fold("gpu_solver_rows", "solvers"),
        Exhibit(
            "gpu_libraries",
            "Time of a solve and its gradient (ms) with other libraries",
            library_times,
            lambda rows: figures.dots(
                having(rows, GRADIENT),
                label=("library", "method"),
                values=(GRADIENT,),
                series=("problem",),
                unit="ms",
            ),
            table_of="libraries",
            figure_of="libraries",
        ),
        fold("gpu_library_rows", "libraries"),
        Exhibit(
            "gpu_flags",
            "Time of a solve, and of a solve and its gradient (ms), with XLA's CUDA "
            "graphs: options of `xla_gpu_enable_command_buffer`",
            lambda rows: pivot(
                growth(rows),
                index=("problem", "method"),
                column="options",
                value="time (ms)",
            ),
            table_of="flags",
        ),
        fold("gpu_flag_rows", "flags"),
        Exhibit(
            "gpu_batch",
            "Time against the number of examples: a bare loop, a solve, and a solve "
            "with its gradient",
            every,
            ft.partial(curves, x="examples", value="time (ms)", series="method"),
            table_of="batch",
            figure_of="batch",
            folded=True,
        ),
        Exhibit(
            "gpu_depth",
            "Temporary memory of a gradient (MB) against the steps of the solve",
            every,
            ft.partial(curves, x="steps", value=MEMORY, series="gradient"),
            table_of="depth",
            figure_of="depth",
        ),
        Exhibit(
            "gpu_images",
            "Training the tutorial's network on Fashion-MNIST: pretraining at fixed "
            "depth, then the equilibrium. Accuracy is that of the test set after the "
            "phase",
            every,
            table_of="images",
        ),
        Exhibit(
            "gpu_text",
            "Training a transformer on characters: a hundred steps at fixed depth, "
            "then a hundred with the equilibrium",
            every,
            table_of="text",
        ),
        Exhibit(
            "gpu_sciml",
            "The protocol of SciML's MNIST tutorial, on 2,000 images of MNIST and one "
            "seed. The log on its page has 5.25 s an epoch and 76.2 % for a "
            "Skip-regularised network with Newton's method, 12.5 s and 70.8 % for a "
            "plain one with VCAB3, on another GPU",
            every,
            table_of="sciml",
        ),
    ),
    minutes=10,
    quick=("--small",),
    takes="data_dir",
)

GPU_SECTIONS = (PROGRAM, DEVICE)


def tell_program(tables: Tables) -> str:
    """Kernels and waits of a step of every solver."""
    return "; ".join(
        f"{row['method']} {row['step']}"
        for row in tables["rows"]
        if row["program"] == "solve"
        and row["loop"] == "1"
        and row["cell"].startswith("dense")
    )


def tell_ratios(tables: Tables) -> str:
    """The times relative to the bare loop."""
    told = []
    for method in (ANDERSON, IMPLICIT):
        found = [row for row in tables["solvers"] if row.get("method") == method]
        if found := having(found, RATIO):
            told.append(f"{method} {span([row[RATIO] for row in found])}")
    return "; ".join(told)


def tell_libraries(tables: Tables) -> str:
    """The fastest method of every other library relative to our fastest."""
    rows = having(tables["libraries"], GRADIENT)
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["library"], row["problem"]
        best[key] = min(row[GRADIENT], best.get(key, float("inf")))
    told = []
    for library in distinct(rows, "library"):
        found = [
            time / best["implicitnets", problem]
            for (name, problem), time in best.items()
            if name == library and ("implicitnets", problem) in best
        ]
        if library != "implicitnets" and found:
            told.append(f"{library} {span(found)}")
    return "; ".join(told)


def tell_memory(tables: Tables) -> str:
    """What a gradient takes with more and more steps."""
    rows = having(tables["depth"], MEMORY)
    told = [
        f"{kind} "
        + span([row[MEMORY] for row in rows if row["gradient"] == kind])
        + " MB"
        for kind in distinct(rows, "gradient")
    ]
    steps = distinct(rows, "steps")
    return f"{'; '.join(told)} (from {min(steps)} to {max(steps)} steps)"


def tell_training(tables: Tables) -> str:
    """Images a second and accuracies."""
    return "; ".join(
        f"{row['precision']}, {row['phase']}: {row['images / s']:.0f} "
        f"({row['accuracy (%)']:.1f} %)"
        for row in having(tables["images"], "images / s")
    )


LINES: tuple[tuple[str, str, str, Callable[[Tables], str]], ...] = (
    (
        "gpu_program",
        "rows",
        f"Kernels and waits of a step, {COMPILED}",
        tell_program,
    ),
    ("gpu", "solvers", "Time relative to a bare loop", tell_ratios),
    (
        "gpu",
        "libraries",
        "Time of a solve and its gradient with another library relative to "
        "implicitnets, each with its fastest method",
        tell_libraries,
    ),
    ("gpu", "depth", "Temporary memory of a gradient of a ResNet cell", tell_memory),
    (
        "gpu",
        "images",
        "Training images a second, and accuracy after the phase",
        tell_training,
    ),
)


def gpu_headline(records: Records) -> list[Row]:
    """A row for everything that was counted or measured, and where."""
    rows = []
    for name, table, what, tell in LINES:
        record = records.get(name, {})
        if record.get("status") != "ok" or record["quick"]:
            continue
        if not record["tables"].get(table):
            continue
        # What is compiled for a device tells which in its own words.
        device = record["machine"].get("device")
        rows.append(
            {
                "what": what,
                "found": tell(record["tables"]),
                "how": "counted" if device is None else f"measured, {device}",
            }
        )
    return rows
