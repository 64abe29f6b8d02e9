"""How fast is the library next to its peers, at the same weights and tolerance?

Every library runs in a process of its own, with the interpreter that `--python
NAME=PATH` gives, or else with this one. A library that cannot be imported is left out.
The repeats of all methods alternate, and a call that takes seconds is timed once. Only
a method whose residual and gradient agree with a float64 reference has a time.

A first result includes all compilation, and no imports. Temporary memory is what XLA
plans, so only the JAX libraries have it.
"""

import dataclasses
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ..kit.methods import bare_loop_program
from ..kit.problems import Problem
from ..kit.reference import reference
from ..kit.results import save, TimingSettings
from ..kit.tables import distinct, print_table, Row, without
from ..kit.timing import (
    compile_and_run,
    interleave,
    progress,
    seconds_a_call,
)
from ..training.problems import PROBLEMS
from .client import Client
from .libraries import LIBRARIES


WORKER = ("-m", "benchmarks.peers.worker")

OURS = "implicitnets"
TIME = "solve + gradient (ms)"
RATIO = f"time / {OURS}"
ANY = "any"


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Time this library and its peers side by side."""

    python: tuple[str, ...] = ()
    """The interpreters of libraries, as `banax=/path/to/python`."""
    libraries: tuple[str, ...] = tuple(LIBRARIES)
    """Which libraries to time."""
    problems: tuple[str, ...] = (
        *("dense-0.9", "dense-0.99", "dense-1024"),
        *("resnet", "trained", "lin"),
    )
    """Which problems to solve."""
    limit: float = 60.0
    """How many seconds a method may take for its first result, or for a timed call."""


def bare_loop(problem: Problem, row: Row) -> Callable[[], Any]:
    """The cost of a row's evaluations and products in loops of nothing else."""
    program = bare_loop_program(problem, row["evaluations"], row["products"])
    arguments = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    return compile_and_run(program, *arguments)[0].call


def compare(config: Config, problem: Problem, folder: pathlib.Path) -> list[Row]:
    """Every method of every library on one problem."""
    pythons = dict(argument.split("=", 1) for argument in config.python)
    ref = reference(problem)
    problem.save(folder / "problem.npz")
    np.save(folder / "norms.npy", ref.norms)

    workers, rows, timers = [], [], {}
    for library in config.libraries:
        python = pythons.get(library, sys.executable)
        worker = Client(library, [python, *WORKER], folder, config.limit)
        workers.append(worker)
        if "methods" not in worker.hello:
            print(f"{library} is left out: {worker.hello['missing']}.")
            continue
        methods = worker.hello["methods"]
        for method in progress(methods, f"{problem.name}, {library}"):
            row = worker.prepare(ref, method)
            row["versions"] = worker.hello["versions"]
            rows.append(row)
            if row["result"] == "ok":
                for what in ("solve", "gradient"):
                    timers[len(rows) - 1, what] = worker.timer(method, what)
    for i, row in enumerate(rows):
        if row["library"] == OURS and row["result"] == "ok":
            call = bare_loop(problem, row)
            timers[i, "bare"] = lambda estimate, call=call: seconds_a_call(
                call, estimate
            )

    seconds = interleave(timers, config.repeats, f"{problem.name}, timing")
    for worker in workers:
        worker.close()
    columns = {
        "solve": "solve (ms)",
        "gradient": TIME,
        "bare": "bare loop (ms)",
    }
    for (i, what), value in seconds.items():
        if math.isfinite(value):
            rows[i][columns[what]] = 1e3 * value
    for row in rows:
        if "bare loop (ms)" in row and TIME in row:
            row["time / bare loop"] = row[TIME] / row["bare loop (ms)"]
    return rows


def fastest(rows: list[Row]) -> list[Row]:
    """The fastest method of every library, by algorithm and of all."""
    table = []
    for problem in distinct(rows, "problem"):
        timed = [row for row in rows if row["problem"] == problem and TIME in row]
        for algorithm in ("Anderson", "Broyden", ANY):
            chosen = [
                row
                for row in timed
                if algorithm == ANY or row["method"].startswith(algorithm)
            ]
            best = {
                library: min(
                    (row for row in chosen if row["library"] == library),
                    key=lambda row: row[TIME],
                )
                for library in distinct(chosen, "library")
            }
            if OURS in best:
                table += [
                    {
                        "problem": problem,
                        "algorithm": algorithm,
                        "library": library,
                        "method": row["method"],
                        TIME: row[TIME],
                        RATIO: row[TIME] / best[OURS][TIME],
                    }
                    for library, row in best.items()
                ]
    return table


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for name in config.problems:
        problem = PROBLEMS[name](config.output_dir)
        with tempfile.TemporaryDirectory() as folder:
            new_rows = compare(config, problem, pathlib.Path(folder))
        print_table(problem.name, without(new_rows, ("problem", "versions")))
        rows += new_rows
    summary = fastest(rows)
    print_table("Solve + gradient with each library's fastest method", summary)
    save(config, "peers", {"rows": rows, "fastest": summary})


if __name__ == "__main__":
    main()
