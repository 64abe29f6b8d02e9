"""What the report shows of every script's tables: `report.py` runs and writes them.

Sentences and figures are computed from the tables; only what a paper reports is quoted.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..kit.measure import promise_figure, Row, without_value


Tables = Mapping[str, list[Row]]

SOLVE = "solve (ms)"
GRADIENT = "solve + gradient (ms)"
BACKWARD = "backward (ms)"
COMPILE = "first result (s)"
# A gradient with a larger error than this is not shown with a time.
LARGEST_ERROR = 1e-2
# How a column with the ratio of a library's time to ours ends.
TIMES_OURS = ", times ours"
MARKERS = "osD^vP*X<>pdh"


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table, a figure and sentences, all made from the tables of a script."""

    name: str
    caption: str
    table: Callable[[Tables], list[Row]]
    draw: Callable[[Tables], Figure]
    say: Callable[[Tables], str]


@dataclasses.dataclass(frozen=True)
class Section:
    """A question of the report, and the script that answers it.

    `minutes` is when the script is stopped, if those before it have not left some of
    theirs. `takes` is the option of the report that is passed on.
    """

    script: str
    title: str
    question: str
    exhibits: tuple[Exhibit, ...]
    minutes: float
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--repeats", "1")
    takes: Literal["data_dir", "python", "text"] | None = None


def distinct(rows: list[Row], *columns: str) -> list[Any]:
    """The values of a column, or of several joined by commas, in their order."""
    return list(dict.fromkeys(joined(row, *columns) for row in rows))


def joined(row: Row, *columns: str) -> Any:
    """The value of a column, or those of several joined by commas."""
    if len(columns) == 1:
        return row[columns[0]]
    return ", ".join(str(row[column]) for column in columns)


def pivot(
    rows: list[Row], index: tuple[str, ...], column: str, value: str
) -> list[Row]:
    """A line for every value of `index`, with `value` for every value of `column`.

    Where there is none stands a word that says why.
    """
    lines: dict[Any, Row] = {
        key: {", ".join(index): key} for key in distinct(rows, *index)
    }
    for row in rows:
        shown = row.get(value)
        lines[joined(row, *index)][row[column]] = (
            without_value(row) if shown is None else shown
        )
    return list(lines.values())


def select(rows: list[Row], *columns: str) -> list[Row]:
    """Some columns of a table."""
    return [{column: row.get(column) for column in columns} for row in rows]


def digits(number: float) -> str:
    """A number with two digits, or all that it has before the point."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def times(ratios: list[float]) -> str:
    """A range of ratios in words."""
    low, high = digits(min(ratios)), digits(max(ratios))
    return f"{low} times" if low == high else f"{low} to {high} times"


def fastest(rows: list[Row], column: str) -> Row:
    """The row with the smallest value."""
    return min(
        (row for row in rows if row.get(column) is not None),
        key=lambda row: row[column],
    )


def plain_ticks(axis: Axis) -> None:
    """Numbers and not powers of ten on a logarithmic axis, and enough of them."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def dots(
    rows: list[Row], label: tuple[str, ...], series: str, value: str, unit: str
) -> Figure:
    """A mark for every row, on a line for every label."""
    names = distinct(rows, *label)
    figure, axis = plt.subplots(
        figsize=(8, 1.2 + 0.27 * len(names)), layout="constrained"
    )
    for marker, key in zip(MARKERS, distinct(rows, series), strict=False):
        points = [
            (row[value], names.index(joined(row, *label)))
            for row in rows
            if row[series] == key and row.get(value) is not None
        ]
        axis.plot(*np.reshape(points, (-1, 2)).T, marker, label=key, alpha=0.8)
    axis.set(xscale="log", xlabel=unit, ylim=(len(names) - 0.5, -0.5))
    plain_ticks(axis.xaxis)
    axis.set_yticks(range(len(names)), names)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def every_row(tables: Tables) -> list[Row]:
    """The rows of most scripts."""
    return tables["rows"]


def on_problems(
    name: str,
    caption: str,
    index: tuple[str, ...],
    value: str,
    unit: str,
    say: Callable[[Tables], str],
    rows: Callable[[Tables], list[Row]] = every_row,
) -> Exhibit:
    """One column of a script's rows: a line for every `index`, for every problem."""
    return Exhibit(
        name,
        caption,
        lambda t: pivot(rows(t), index, "problem", value),
        lambda t: dots(rows(t), index, "problem", value, unit),
        say,
    )


def lines(axis: Axes, x: str, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """Curves on logarithmic axes."""
    for marker, (name, points) in zip(MARKERS, curves.items(), strict=False):
        axis.loglog(*np.reshape(points, (-1, 2)).T, marker=marker, label=name)
    plain_ticks(axis.xaxis)
    plain_ticks(axis.yaxis)
    axis.set(xlabel=x)
    axis.grid(alpha=0.3)


def promised(name: str, caption: str) -> Exhibit:
    """What a script promises, and whether it was kept."""
    return Exhibit(
        name,
        caption,
        lambda tables: tables["promises"],
        lambda tables: promise_figure(tables["promises"]),
        promise_sentences,
    )


def promise_sentences(tables: Tables) -> str:
    promises = tables["promises"]
    broken = [row["promise"] for row in promises if row["kept"] != "yes"]
    told = f"{len(promises) - len(broken)} of {len(promises)} were kept."
    return told + (f" Not kept: {'; '.join(broken)}." if broken else "")


# Discrete, continuous, finite time.


def neural_ode_table(tables: Tables) -> list[Row]:
    return [
        {k: v for k, v in row.items() if k not in ("data", COMPILE)}
        for row in tables["rows"]
    ]


def neural_ode_figure(tables: Tables) -> Figure:
    passes = [
        {**row, "pass": name, "ms": row[f"{name} (ms)"]}
        for row in tables["rows"]
        for name in ("forward", "backward")
    ]
    return dots(passes, ("kind", "model"), "pass", "ms", "ms a batch")


def neural_ode_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    continuous = next(row for row in rows if row["kind"] == "continuous DEQ")
    odes = [row for row in rows if row["kind"] == "neural ODE"]

    def ratios(column):
        return times([row[column] / continuous[column] for row in odes])

    accuracies = [row["accuracy (%)"] for row in rows]
    return (
        f"On {continuous['data']}, the backward pass of the neural ODEs takes "
        f"{ratios(BACKWARD)} as long as that of the continuous DEQ with "
        f"{continuous['model']}, the forward pass {ratios('forward (ms)')}, a "
        f"training step {ratios('training step (ms)')}, and a gradient "
        f"{ratios('temp (MB)')} the memory. Accuracies after training lie "
        f"between {min(accuracies):.1f} and {max(accuracies):.1f} %."
    )


# Skip.


def skip_table(tables: Tables) -> list[Row]:
    return [
        {
            "data": row["data"],
            "solver": row["solver"],
            "model": row["model"],
            "accuracy (%)": f"{row['accuracy (%)']:.1f} "
            f"± {row['deviation of accuracy']:.1f}",
            "evaluations": f"{row['evaluations']:.1f} "
            f"± {row['deviation of evaluations']:.1f}",
            "converged (%)": row["converged (%)"],
            "training step (ms)": row["training step (ms)"],
            "prediction (ms)": row["prediction (ms)"],
        }
        for row in tables["rows"]
    ]


def skip_figure(tables: Tables) -> Figure:
    rows = [{**row, "on": f"{row['data']}, {row['solver']}"} for row in tables["rows"]]
    return dots(rows, ("model",), "on", "evaluations", "cell evaluations, mean")


def skip_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    plain = {joined(r, "data", "solver"): r for r in rows if r["model"] == "plain"}

    def compare(model):
        pairs = [
            (row, plain[joined(row, "data", "solver")])
            for row in rows
            if row["model"] == model
        ]
        fewer = times([p["evaluations"] / row["evaluations"] for row, p in pairs])
        changes = [row["accuracy (%)"] - p["accuracy (%)"] for row, p in pairs]
        return (
            f"Plain DEQs need {fewer} the evaluations of {model} ones, whose accuracy "
            f"is {min(changes):+.1f} to {max(changes):+.1f} points from theirs."
        )

    return " ".join(compare(model) for model in ("Skip", "Skip-regularised"))


# Solvers.


def solver_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    best = []
    for name in distinct(rows, "problem"):
        row = fastest([r for r in rows if r["problem"] == name], SOLVE)
        best.append(f"{row['method']} on {name}")
    run = [row for row in rows if "false claims" in row]
    wrong = [row for row in run if row["false claims"] > 0]
    named = "; ".join(f"{row['method']} on {row['problem']}" for row in wrong)
    return (
        f"Of {len(run)} rows, {len(wrong)} claimed for some example a success that it "
        f"had not{f' ({named})' if wrong else ''}. The fastest: {'; '.join(best)}."
    )


def evaluation_sentences(tables: Tables) -> str:
    fewest = []
    for name in distinct(counted(tables), "problem"):
        solved = [
            row
            for row in counted(tables)
            if row["problem"] == name and row["result"] == "ok"
        ]
        row = fastest(solved, "cost")
        fewest.append(f"{row['method']} on {name} ({row['cost']})")
    return (
        "Solvers that do not tell their evaluations are left out. The fewest: "
        f"{'; '.join(fewest)}."
    )


def counted(tables: Tables) -> list[Row]:
    return [
        {**row, "cost": row["evaluations"] + (row.get("products") or 0)}
        for row in tables["rows"]
        if row.get("evaluations") is not None
    ]


def continuous_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    told = []
    for name in distinct(rows, "problem"):
        best = {
            kind: fastest(
                [r for r in rows if r["problem"] == name and r["kind"] == kind],
                GRADIENT,
            )
            for kind in ("discrete", "continuous")
        }
        ratio = best["continuous"][GRADIENT] / best["discrete"][GRADIENT]
        told.append(
            f"on {name} {best['continuous']['method']} takes {digits(ratio)} times "
            f"as long as {best['discrete']['method']}"
        )
    return f"The fastest of each kind: {'; '.join(told)}."


# Adjoints.


def gradient_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    worst = {
        name: max(r["gradient error"] for r in rows if r["adjoint"] == name)
        for name in distinct(rows, "adjoint")
    }
    exact = [name for name, error in worst.items() if error <= LARGEST_ERROR]
    return (
        f"On every problem within an error of {LARGEST_ERROR:.0%}: {'; '.join(exact)}. "
        "The others trade error for time. An asterisk: the solve itself was stopped "
        "before it had converged."
    )


def gradient_table(tables: Tables) -> list[Row]:
    column = "gradient error"
    marked = [
        row if row["forward"] == "ok" else {**row, column: f"{row[column]:.2g} *"}
        for row in tables["rows"]
    ]
    return pivot(marked, ("adjoint",), "problem", column)


def equal_cost(tables: Tables) -> list[Row]:
    """A row for every entry of the table of errors at equal cost."""
    return [
        {"problem": row["problem"], "adjoint": name, "error": error}
        for row in tables["shine"]
        for name, error in row.items()
        if name != "problem"
    ]


def equal_cost_sentences(tables: Tables) -> str:
    rows = tables["shine"]
    told = []
    for name in rows[0]:
        adjoint, _, cost = name.partition(", ")
        if adjoint not in ("problem", "SHINE"):
            ratios = [row[f"SHINE, {cost}"] / row[name] for row in rows]
            told.append(f"{times(ratios)} that of {adjoint} ({cost})")
    return f"SHINE's error is {'; '.join(told)}."


def backward_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    implicit = {r["problem"]: r[BACKWARD] for r in rows if r["adjoint"] == "implicit"}

    def ratios(adjoint):
        return times(
            [
                row[BACKWARD] / implicit[row["problem"]]
                for row in rows
                if row["adjoint"] == adjoint
            ]
        )

    return (
        f"The Jacobian-free backward pass takes {ratios('Jacobian-free')} as long as "
        f"the implicit one, the unrolled one {ratios('unrolled')}."
    )


def memory_figure(tables: Tables) -> Figure:
    rows = tables["memory"]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    names = [name for name in rows[0] if name != "steps"]
    curves = {name: [(row["steps"], row[name]) for row in rows] for name in names}
    lines(axis, "solver steps", curves)
    axis.set(ylabel="temporary memory (MB)")
    axis.legend()
    return figure


def memory_sentences(tables: Tables) -> str:
    first, last = tables["memory"][0], tables["memory"][-1]
    growth = "; ".join(
        f"{name}: {digits(last[name] / first[name])}"
        for name in first
        if name != "steps"
    )
    return (
        f"The memory of a gradient with {last['steps']} steps over that with "
        f"{first['steps']}: {growth}."
    )


# Linear solvers.


def accurate(tables: Tables) -> list[Row]:
    return [
        row
        if row["gradient error"] <= LARGEST_ERROR
        else {k: v for k, v in row.items() if k != BACKWARD}
        for row in tables["rows"]
    ]


def linear_solver_sentences(tables: Tables) -> str:
    rows = [row for row in accurate(tables) if BACKWARD in row]
    best = {
        name: fastest([r for r in rows if r["problem"] == name], BACKWARD)
        for name in distinct(rows, "problem")
    }
    told = []
    for solver in distinct(rows, "linear solver"):
        chosen = [row for row in rows if row["linear solver"] == solver]
        slower = [row[BACKWARD] / best[row["problem"]][BACKWARD] for row in chosen]
        told.append(f"{solver}: {digits(max(slower))} ({len(chosen)})")
    return (
        "The most times that each took as long as the fastest, and on how many of the "
        f"{len(best)} problems its gradient was accurate: {'; '.join(told)}."
    )


# Peers.


def peer_sentences(tables: Tables) -> str:
    rows = tables["rows"]
    missing = [row for row in rows if row.get(GRADIENT) is None]
    named = [f"{joined(r, 'library', 'method')} on {r['problem']}" for r in missing]
    return (
        f"{len(rows) - len(missing)} of {len(rows)} rows passed the check of residual "
        "and gradient and are timed" + (f"; not {'; '.join(named)}." if named else ".")
    )


def ratio_rows(tables: Tables) -> list[Row]:
    """A row for every ratio between a library's fastest method and ours."""
    return [
        {
            "problem": row["problem"],
            "algorithm": row["algorithm"],
            "library": column.removesuffix(TIMES_OURS),
            "ratio": ratio,
        }
        for row in tables["fastest"]
        for column, ratio in row.items()
        if column.endswith(TIMES_OURS)
    ]


def ratio_sentences(tables: Tables) -> str:
    rows = [row for row in ratio_rows(tables) if row["algorithm"] == "fastest"]
    if not rows:
        return "No other library could be imported."
    told = []
    for library in distinct(rows, "library"):
        found = [row["ratio"] for row in rows if row["library"] == library]
        told.append(f"{library}: {times(found)}")
    return (
        "The time of each library's fastest method that passed its check, relative to "
        f"ours, over the problems: {'; '.join(told)}."
    )


# Scaling.


def scaling_table(*columns: str) -> Callable[[Tables], list[Row]]:
    return lambda tables: select(tables["rows"], "varied", "size", "method", *columns)


def scaling_figure(column: str) -> Callable[[Tables], Figure]:
    def draw(tables):
        rows = tables["rows"]
        figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
        for axis, what in zip(axes.flat, distinct(rows, "varied"), strict=False):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row["varied"] == what and row.get(column) is not None:
                    point = row["size"], row[column]
                    curves.setdefault(row["method"], []).append(point)
            lines(axis, what, curves)
            axis.set(ylabel=column)
        axes[0, 0].legend()
        return figure

    return draw


def scaling_sentences(tables: Tables) -> str:
    told = []
    for what in distinct(tables["rows"], "varied"):
        rows = [
            row
            for row in tables["rows"]
            if row["varied"] == what and row.get(GRADIENT) is not None
        ]
        low = min(row["size"] for row in rows)
        high = max(row["size"] for row in rows)
        at = {(row["method"], row["size"]): row[GRADIENT] for row in rows}
        growth = [
            at[method, high] / at[method, low]
            for method in distinct(rows, "method")
            if (method, high) in at and (method, low) in at
        ]
        told.append(f"{what} {low} to {high}: {times(growth)}")
    return (
        f"How many times as long the largest takes as the smallest: {'; '.join(told)}."
    )


def compile_sentences(tables: Tables) -> str:
    seconds = [row[COMPILE] for row in tables["rows"] if row.get(COMPILE) is not None]
    return (
        f"The first result of a compiled solve and gradient is there after "
        f"{digits(min(seconds))} to {digits(max(seconds))} seconds."
    )


SECTIONS = (
    Section(
        "neural_ode",
        "Discrete DEQ, continuous DEQ, neural ODE",
        "What does a neural ODE cost next to a discrete and a continuous DEQ of the "
        "same cell, at the same weights and tolerance? (Pal et al., arXiv 2201.12240, "
        "report a backward pass 4.7 to 6.2 times and a training 2 to 4 times as long "
        "as a continuous DEQ's.)",
        (
            Exhibit(
                "neural_ode",
                "Forward and backward pass at the same weights",
                neural_ode_table,
                neural_ode_figure,
                neural_ode_sentences,
            ),
        ),
        minutes=3.5,
        options=("--repeats", "3", "--seeds", "1", "--steps", "500"),
        quick=("--repeats", "1", "--steps", "10", "--seeds", "1"),
        takes="data_dir",
    ),
    Section(
        "skip",
        "Skip and Skip-regularised against plain",
        "How many evaluations does a start that predicts the equilibrium save, and at "
        "what accuracy? (Pal et al. report 18.3 evaluations against 4.0 at equal "
        "accuracy, on MNIST with this network.)",
        (
            Exhibit(
                "skip",
                "Cell evaluations on the test set",
                skip_table,
                skip_figure,
                skip_sentences,
            ),
        ),
        minutes=5.5,
        options=("--repeats", "3"),
        quick=("--repeats", "1", "--steps", "10", "--seeds", "2"),
        takes="data_dir",
    ),
    Section(
        "solvers",
        "Every solver",
        "What does every solver need, on maps from easy to expansive, and does it ever "
        "claim a success it had not?",
        (
            on_problems(
                "solvers", "Time of a solve", ("method",), SOLVE, "ms", solver_sentences
            ),
            on_problems(
                "evaluations",
                "Cell evaluations and Jacobian products, the most of an example",
                ("method",),
                "cost",
                "evaluations and products",
                evaluation_sentences,
                rows=counted,
            ),
            promised("solver_promises", "What the solvers promise"),
        ),
        minutes=6.5,
        options=("--repeats", "3", "--problems", "dense-1.2", "lin"),
        quick=("--repeats", "1", "--problems", "lin"),
    ),
    Section(
        "discrete_vs_continuous",
        "Discrete against continuous solvers",
        "Do ODE solvers reach the equilibrium of the same cell at a fair price?",
        (
            on_problems(
                "discrete_vs_continuous",
                "Time of a solve and its gradient",
                ("kind", "method"),
                GRADIENT,
                "ms",
                continuous_sentences,
            ),
        ),
        minutes=6.5,
        options=("--repeats", "3"),
        quick=("--repeats", "1", "--batch", "2"),
    ),
    Section(
        "gradients",
        "Every adjoint",
        "How good is every adjoint's gradient, and what does it cost in time and "
        "memory?",
        (
            Exhibit(
                "gradient_error",
                "Relative error of the gradient",
                gradient_table,
                lambda t: dots(
                    t["rows"],
                    ("adjoint",),
                    "problem",
                    "gradient error",
                    "relative error",
                ),
                gradient_sentences,
            ),
            Exhibit(
                "equal_cost",
                "Relative error of the gradient at equal numbers of products",
                lambda t: t["shine"],
                lambda t: dots(
                    equal_cost(t), ("problem",), "adjoint", "error", "relative error"
                ),
                equal_cost_sentences,
            ),
            on_problems(
                "backward",
                "Time of the backward pass",
                ("adjoint",),
                BACKWARD,
                "ms",
                backward_sentences,
            ),
            Exhibit(
                "memory",
                "Temporary memory of a gradient against the solver's steps (MB)",
                lambda t: t["memory"],
                memory_figure,
                memory_sentences,
            ),
            promised("gradient_promises", "What the adjoints promise"),
        ),
        minutes=4.5,
        options=("--repeats", "3", "--radii", "0.99"),
        quick=("--repeats", "1", "--batch", "1", "--radii", "0.5"),
    ),
    Section(
        "linear_solvers",
        "Linear solvers of the implicit adjoint",
        "Which linear solver should the implicit adjoint have?",
        (
            on_problems(
                "linear_solvers",
                "Time of the backward pass, where the gradient is accurate",
                ("linear solver",),
                BACKWARD,
                "ms",
                linear_solver_sentences,
                rows=accurate,
            ),
        ),
        minutes=3.0,
        options=(
            *("--repeats", "3"),
            *("--problems", "dense-0.99", "resnet", "lin-1.2"),
        ),
        quick=("--repeats", "1", "--batch", "1", "--problems", "dense-0.5"),
    ),
    Section(
        "peers",
        "Other libraries",
        "How fast is the library next to its peers, at the same weights and tolerance?",
        (
            on_problems(
                "peers",
                "Time of a solve and its gradient",
                ("library", "method"),
                GRADIENT,
                "ms",
                peer_sentences,
            ),
            Exhibit(
                "peer_ratios",
                "How many times ours the fastest of each library takes",
                lambda t: t["fastest"],
                lambda t: dots(
                    ratio_rows(t),
                    ("problem", "algorithm"),
                    "library",
                    "ratio",
                    "times ours",
                ),
                ratio_sentences,
            ),
            promised("peer_promises", "What the library promises next to others"),
        ),
        minutes=7.5,
        options=(
            *("--repeats", "2"),
            *("--limit", "30"),
            *("--problems", "dense-0.99", "trained", "lin"),
        ),
        quick=("--repeats", "1", "--problems", "lin"),
        takes="python",
    ),
    Section(
        "scaling",
        "Scaling",
        "How does the time of a solve and its gradient grow with state, batch, history "
        "and devices, and how long does it take to compile? The devices are simulated: "
        "they show what sharding costs, not what it gains.",
        (
            Exhibit(
                "scaling",
                "Time of a solve and its gradient",
                scaling_table("evaluations", SOLVE, GRADIENT),
                scaling_figure(GRADIENT),
                scaling_sentences,
            ),
            Exhibit(
                "compile",
                "Seconds until the first result, compilation included",
                scaling_table(COMPILE, "temp (MB)"),
                scaling_figure(COMPILE),
                compile_sentences,
            ),
        ),
        minutes=3.0,
        options=(
            *("--repeats", "3"),
            *("--batches", "1", "32", "512"),
            *("--histories", "5", "20"),
        ),
        quick=(
            *("--repeats", "1", "--states", "32", "64", "--batches", "2", "4"),
            *("--histories", "5", "--devices", "1", "2"),
        ),
    ),
)
