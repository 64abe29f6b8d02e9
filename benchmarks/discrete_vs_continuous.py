"""One cell, the same weights: do ODE solvers reach its equilibrium at a fair price?

Every discrete solver and every ODE solver, to the same tolerance, on random and on
trained weights: cell evaluations, times, and the errors of equilibrium and gradient.
"""

import dataclasses

import tyro

from .kit.measure import bar_figure, print_table, progress, Row, save, TimingSettings
from .kit.methods import continuous_methods, discrete_methods, prepare, time_rows
from .kit.problems import Problem, PROBLEMS, reference


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Compare discrete solvers with ODE solvers followed to the steady state."""

    batch: int = 32
    """How many examples to solve."""


def compare(config: Config, problem: Problem) -> list[Row]:
    """Every solver on one problem."""
    problem = dataclasses.replace(
        problem,
        inputs=problem.inputs[: config.batch],
        cotangent=problem.cotangent[: config.batch],
    )
    ref = reference(problem)
    kinds = {
        "discrete": discrete_methods(problem, float(ref.norms.min())),
        "continuous": continuous_methods(problem),
    }
    prepared, kind_of = [], []
    for kind, methods in kinds.items():
        for method in progress(methods, f"{problem.name}, {kind}"):
            prepared.append(prepare(problem, ref, method))
            kind_of.append(kind)
    rows = time_rows(prepared, config.repeats, f"{problem.name}, timing")
    return [{"kind": kind, **row} for kind, row in zip(kind_of, rows, strict=True)]


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for name in ("dense-0.9", "trained"):
        problem = PROBLEMS[name](config.output_dir)
        new_rows = compare(config, problem)
        print_table(problem.name, new_rows)
        rows += new_rows
    labelled = [{**row, "label": f"{row['method']} ({row['kind']})"} for row in rows]
    times = bar_figure(
        labelled,
        panel="problem",
        label="label",
        values=["solve (ms)", "solve + gradient (ms)"],
        unit="ms",
    )
    evaluations = bar_figure(
        labelled,
        panel="problem",
        label="label",
        values=["evaluations"],
        unit="cell evaluations",
    )
    save(config, "discrete_vs_continuous", {"rows": rows}, times, evaluations)


if __name__ == "__main__":
    main()
