"""What the benchmarks share: timing, tables, result files."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import matplotlib


matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tabulate import tabulate
from tqdm import tqdm


LIBRARIES = (
    "implicitnets",
    "jax",
    "equinox",
    "optimistix",
    "lineax",
    "diffrax",
    "numpy",
)
# A call shorter than this is timed several at a time.
SHORTEST_SECONDS = 0.02
# A row that has taken longer altogether is not timed again, and one whose first call
# has taken this long is not timed again at all.
LONGEST_SECONDS = 10.0
LONGEST_CALL = 2.0

# How the result of a row begins that was left out on purpose.
NOT_RUN = "not run"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options that every script has."""

    output_dir: pathlib.Path = pathlib.Path(__file__).parent / "results"
    """Folder that the figures and the JSON files are written to."""


@dataclasses.dataclass(frozen=True)
class TimingSettings(Settings):
    """The options of the scripts that time calls."""

    repeats: int = 9
    """Timed repeats of every row; the median is shown."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function, with what it took until its first result.

    `call` is it at the arguments that it was compiled for, `at` at any of their kind.
    """

    call: Callable[[], Any]
    at: Callable[..., Any]
    first_seconds: float
    temp_bytes: int


def compile_and_run(function: Callable, *args: Any) -> tuple[Compiled, Any]:
    """Compile a JAX function of arrays, and run it once."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    out = jax.block_until_ready(compiled(*args))
    first_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temp_bytes = 0 if memory is None else memory.temp_size_in_bytes

    def call():
        return jax.block_until_ready(compiled(*args))

    return Compiled(call, compiled, first_seconds, temp_bytes), out


def seconds_a_call(call: Callable[[], Any], estimate: float) -> float:
    """The wall time of one call, the mean over several if they are short."""
    number = max(1, round(SHORTEST_SECONDS / max(estimate, 1e-6)))
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def interleave(
    timers: Mapping[Any, Callable[[float], float]], repeats: int, description: str
) -> dict[Any, float]:
    """The median wall times of several functions, timed in turns.

    **Arguments:**

    - `timers`: each takes an estimate of its seconds, and returns its seconds.
    - `repeats`: the number of turns, after one that warms up. What takes seconds needs
        no warming up, and its first turn is its only one.
    - `description`: of the progress bar.

    **Returns:**

    The median seconds of each.
    """
    times = {key: [timer(1.0)] for key, timer in timers.items()}
    for _ in progress(range(repeats), description):
        for key, timer in timers.items():
            if times[key][0] < LONGEST_CALL and sum(times[key]) < LONGEST_SECONDS:
                times[key].append(timer(times[key][-1]))
    return {key: statistics.median(v[1:] or v) for key, v in times.items()}


def time_calls(
    calls: Mapping[Any, Callable[[], Any]], repeats: int, description: str
) -> dict[Any, float]:
    """As `interleave`, of functions without arguments in this process."""
    timers = {
        key: lambda estimate, call=call: seconds_a_call(call, estimate)
        for key, call in calls.items()
    }
    return interleave(timers, repeats, description)


def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal."""
    return tqdm(items, desc=description, leave=False, disable=None)


def print_table(title: str, rows: list[Row]) -> None:
    """Print rows with a title."""
    print(f"\n{title}\n\n{markdown_table(rows)}\n", flush=True)


def markdown_table(rows: list[Row]) -> str:
    """Rows, whose keys are the columns, as a Markdown table without empty columns."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [k for k in keys if any(row.get(k) is not None for row in rows)]
    cells = [[_format(row.get(column)) for column in columns] for row in rows]
    align = ["left" if _is_text(rows, column) else "right" for column in columns]
    return tabulate(cells, columns, "github", colalign=align, disable_numparse=True)


def _is_text(rows: list[Row], column: str) -> bool:
    return any(isinstance(row.get(column), str) for row in rows)


def _format(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}"
        # Three digits, and an exponent only where there is no number to picture.
        rounded = float(f"{value:.3g}")
        return f"{rounded:.0f}" if 1e3 <= abs(rounded) < 1e6 else f"{rounded:.3g}"
    return str(value)


def promise(
    what: str,
    measured: float,
    most: float | None = None,
    *,
    least: float | None = None,
    below: bool = False,
) -> Row:
    """A line of a table of promises: a figure, and what it may be.

    **Arguments:**

    - `what`: which figure.
    - `measured`: it.
    - `most`: the most that it may be, if there is such a bound.
    - `least`: the least that it may be, if there is such a bound.
    - `below`: whether it has to be below `most`.

    **Returns:**

    The line.
    """
    kept = (least is None or measured >= least) and (
        most is None or (measured < most if below else measured <= most)
    )
    return {
        "promise": what,
        "measured": measured,
        "at least": least,
        "below": most if below else None,
        "at most": None if below else most,
        "kept": "yes" if kept else "NO",
    }


def save(
    settings: Settings, name: str, tables: Mapping[str, list[Row]], *figures: Figure
) -> None:
    """Write tables with the machine and the versions as JSON, and figures as PNG."""
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "versions": versions(), "tables": tables}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=float))
    written = [path]
    for number, figure in enumerate(figures, start=1):
        suffix = "" if len(figures) == 1 else f"_{number}"
        path = folder / f"{name}{suffix}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)
    print("Written: " + ", ".join(str(path) for path in written))


def machine() -> dict[str, Any]:
    """What the benchmarks ran on."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that are measured here."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def without_value(row: Row) -> str:
    """Why a row has no time, in a word or two."""
    if row.get("result", "").startswith(NOT_RUN):
        return NOT_RUN
    solved, _, total = row.get("converged", "").partition("/")
    return "failed" if solved == total else f"{solved}/{total} solved"


def bar_figure(
    rows: list[Row], *, panel: str, label: str, values: list[str], unit: str
) -> Figure:
    """Horizontal bars of some columns of rows, one panel for each value of another.

    A row without a value has in place of its bar a word that says why.

    **Arguments:**

    - `rows`: the table.
    - `panel`, `label`: the columns that say which panel a row is in, and its name.
    - `values`: the columns to draw.
    - `unit`: of the logarithmic axis.

    **Returns:**

    The figure.
    """
    panels = list(dict.fromkeys(row[panel] for row in rows))
    count = max(sum(row[panel] == name for row in rows) for name in panels)
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(5.5 * num_columns, (1 + 0.33 * count) * num_rows),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    height = 0.8 / len(values)
    for axis, name in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if row[panel] == name]
        known = [row[v] for row in chosen for v in values if row.get(v) is not None]
        left = min(known, default=1) / 2
        for i, value in enumerate(values):
            for y, row in enumerate(chosen):
                position = y + (i - (len(values) - 1) / 2) * height
                if row.get(value) is None:
                    text = f" {without_value(row)}"
                    axis.text(left, position, text, va="center", color="grey")
                else:
                    axis.barh(position, row[value], height, color=f"C{i}")
        axis.set(title=name, xscale="log", xlabel=unit)
        axis.set_xlim(left=left)
        axis.set_yticks(range(len(chosen)), [row[label] for row in chosen])
        axis.invert_yaxis()
    handles = [Patch(color=f"C{i}", label=v) for i, v in enumerate(values)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(values))
    return figure


def curve_figure(rows: list[Row], *, x: str, values: Mapping[str, str]) -> Figure:
    """A panel for some columns of rows, in which those of a model make a curve.

    **Arguments:**

    - `rows`: the table.
    - `x`: the column to draw them over.
    - `values`: the columns to draw, and what their axes say.

    **Returns:**

    The figure.
    """
    figure, axes = plt.subplots(
        1,
        len(values),
        figsize=(max(6.5, 4.5 * len(values)), 3.5),
        layout="constrained",
        squeeze=False,
    )
    for axis, (value, label) in zip(axes.flat, values.items(), strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            points = [(row[x], row[value]) for row in rows if row["model"] == name]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set(xlabel=x, ylabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return figure


def promise_figure(rows: list[Row]) -> Figure:
    """Bars of what was measured as a share of what was promised: 1 or less is kept."""
    shares = []
    for row in rows:
        share = _share(row)
        if share is not None:
            panel = "the bound / measured, or measured / the bound"
            shares.append({**row, "panel": panel, "share": share})
    figure = bar_figure(
        shares, panel="panel", label="promise", values=["share"], unit="share"
    )
    figure.axes[0].axvline(1, color="grey")
    figure.legends[0].remove()
    figure.set_size_inches(10, figure.get_size_inches()[1])
    return figure


def _share(row: Row) -> float | None:
    """How much of its bound a promise takes up; `None` for what no bar can show."""
    measured, least = row["measured"], row.get("at least")
    most = row.get("at most") or row.get("below")
    if measured is None or not 0 < measured < math.inf:
        return None
    shares = [] if least is None else [least / measured]
    if most:
        shares.append(measured / most)
    return max(shares, default=None)
