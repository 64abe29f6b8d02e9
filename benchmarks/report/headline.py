"""The report's headline: what the library is for, in a line of numbers each."""

import statistics
from collections.abc import Callable

from ..kit.tables import distinct, joined, Row, Tables
from .page import Records
from .sections import BACKWARD, MEMORY, RATIO, SECTIONS


OURS = "implicitnets"


def number(value: float) -> str:
    """Two digits, or all that there are before the point."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def span(values: list[float]) -> str:
    """The smallest to the largest."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def less_work(tables: Tables) -> str:
    """What a Skip-regularised start saves."""
    rows = {joined(row, "data", "solver", "model"): row for row in tables["rows"]}
    told = []
    for where in distinct(tables["rows"], "data", "solver"):
        plain, skip = (rows[f"{where}, {m}"] for m in ("plain", "Skip-regularised"))
        told.append(
            f"{where}: {plain['evaluations']:.1f} and {skip['evaluations']:.1f} "
            f"({plain['accuracy (%)']:.1f} and {skip['accuracy (%)']:.1f} %)"
        )
    return "; ".join(told)


def flat_memory(tables: Tables) -> str:
    """What the implicit gradient takes, and the unrolled one."""
    rows = tables["memory"]
    told = []
    for name in ("implicit", "plain iteration, unrolled"):
        sizes = [row[MEMORY] for row in rows if row["adjoint"] == name]
        told.append(f"{name} {span(sizes)} MB")
    steps = distinct(rows, "steps")
    return f"{'; '.join(told)} (from {min(steps)} to {max(steps)} steps)"


def cheap_gradients(tables: Tables) -> str:
    """Times relative to the implicit adjoint's, and what they cost in accuracy."""
    exact = {
        row["problem"]: row[BACKWARD]
        for row in tables["rows"]
        if row["adjoint"] == "implicit"
    }
    told = []
    for name in ("SHINE, 0 refinements", "Jacobian-free"):
        rows = [row for row in tables["rows"] if row["adjoint"] == name]
        ratios = [row[BACKWARD] / exact[row["problem"]] for row in rows]
        errors = [row["gradient error"] for row in rows]
        told.append(f"{name} {span(ratios)} (error {span(errors)})")
    return "; ".join(told)


def continuous(tables: Tables) -> str:
    """The backward passes of neural ODEs next to a continuous DEQ's."""
    deq = next(row for row in tables["rows"] if row["kind"] == "continuous DEQ")
    return "; ".join(
        f"{row['model']} {number(row[BACKWARD] / deq[BACKWARD])}"
        for row in tables["rows"]
        if row["kind"] == "neural ODE"
    )


def false_claims(tables: Tables) -> str:
    """Successes that were claimed and not had."""
    rows = [row for row in tables["rows"] if row.get("false claims") is not None]
    claims = sum(row["false claims"] for row in rows)
    solves = sum(int(row["converged"].partition("/")[2]) for row in rows)
    methods, problems = distinct(rows, "method"), distinct(rows, "problem")
    return (
        f"{claims} of {solves} solves, by {len(methods)} solvers on {len(problems)} "
        "problems"
    )


def speed(tables: Tables) -> str:
    """The median and the worst problem against each library."""
    rows = [
        row
        for row in tables["fastest"]
        if row["algorithm"] == "any" and row["library"] != OURS
    ]
    told = []
    for library in distinct(rows, "library"):
        found = [row for row in rows if row["library"] == library]
        worst = min(found, key=lambda row: row[RATIO])
        median = statistics.median(row[RATIO] for row in found)
        told.append(
            f"{library} {number(median)} (least of {len(found)}: "
            f"{number(worst[RATIO])}, {worst['problem']})"
        )
    return "; ".join(told)


ROWS: tuple[tuple[str, str, Callable[[Tables], str]], ...] = (
    (
        "skip",
        "**Less work in use**: cell evaluations (and accuracy) of a plain and of a "
        "Skip-regularised DEQ",
        less_work,
    ),
    (
        "gradients",
        "**Flat memory**: temporary memory of a gradient of a ResNet cell",
        flat_memory,
    ),
    (
        "gradients",
        "**Cheap gradients**: backward-pass time relative to the exact adjoint, at "
        "spectral radius 0.99",
        cheap_gradients,
    ),
    (
        "neural_ode",
        "**Continuous DEQs**: backward-pass time of a neural ODE relative to a "
        "continuous DEQ of the same cell and weights",
        continuous,
    ),
    (
        "discrete_vs_continuous",
        "**False claims**: solves said to be successful whose residual says otherwise",
        false_claims,
    ),
    (
        "peers",
        "**Speed**: time of a solve and its gradient with another library relative to "
        "implicitnets, the median of all problems and the least",
        speed,
    ),
)


def headline(records: Records) -> list[Row]:
    """A row for everything that has been measured, with a link to its section."""
    anchors = {section.name: section.anchor for section in SECTIONS}
    measured = {
        name: record["tables"]
        for name, record in records.items()
        if record["status"] == "ok" and not record["quick"]
    }
    return [
        {
            "what": what,
            "measured": tell(measured[name]),
            "where": f"[report](report.md#{anchors[name]})",
        }
        for name, what, tell in ROWS
        if name in measured
    ]
