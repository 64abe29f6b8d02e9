"""How fast is the library next to its peers, at the same weights and tolerance?

Every library runs in a process of its own, with the interpreter that has it: as many as
are given by `--python NAME=PATH`, the others with this one, and those that cannot be
imported there are left out. All are timed in turns, what takes seconds once, and only
what has passed its check: residual and gradient against a float64 reference.

A first result is that of a process that has imported everything and compiled nothing,
of the solve and of the gradient alike. Temporary memory is what XLA plans for, so that
only the JAX libraries have it.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ..kit.measure import (
    bar_figure,
    compile_and_run,
    interleave,
    print_table,
    progress,
    promise,
    promise_figure,
    Row,
    save,
    seconds_a_call,
    SHORTEST_SECONDS,
    TimingSettings,
)
from ..kit.methods import bare_loop_program, verdict
from ..kit.problems import Problem, PROBLEMS, Reference, reference, residuals
from .worker import LIBRARIES


WORKER = pathlib.Path(__file__).parent / "peer_worker.py"

OURS = "implicitnets"
TIME = "solve + gradient (ms)"
# Of algorithm against algorithm, how many times ours a library's has to take; Anderson
# acceleration with the library's own ridge, and with one that does not hold it back.
ALGORITHMS = (
    ("torchdeq", "Anderson", 3.0),
    ("torchdeq", "Anderson, small ridge", 3.0),
    ("jaxopt", "Anderson", 3.0),
    ("jaxopt", "Anderson, small ridge", 3.0),
    ("banax", "Anderson", 1.7),
    ("banax", "Anderson, small ridge", 1.7),
    ("torchdeq", "Broyden", 3.0),
    ("banax", "Broyden", 2.0),
)
# Of the fastest against the fastest.
BEST = {
    "dense-0.9": 1.25,
    "dense-0.99": 1.25,
    "dense-1024": 1.25,
    "trained": 2.0,
    "lin": 2.0,
}


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
    """Seconds that a method may take for its first result, or for a timed call."""


class Worker:
    """A process with one library and one problem, begun afresh when it has ended.

    One that takes too long is ended.

    **Arguments:**

    - `library`: its name.
    - `python`: the interpreter that has it.
    - `folder`: where the problem is, and where results go.
    - `limit`: the seconds that it may take for an answer.
    """

    def __init__(self, library: str, python: str, folder: pathlib.Path, limit: float):
        self.library = library
        self.python = python
        self.folder = folder
        self.limit = limit
        self.log = folder / f"{library}.log"
        self.hello = self._start()

    def _start(self) -> dict[str, Any]:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    self.python,
                    str(WORKER),
                    self.library,
                    self.folder / "problem.npz",
                    self.folder / "norms.npy",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        return self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer, which has `missing` if none comes."""
        if self.process.poll() is not None:
            hello = self._start()
            if "methods" not in hello:
                return hello
        assert self.process.stdin is not None
        # If it has just ended, there is no answer.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.close()
            return {"missing": f"not done in {self.limit:.0f} s"}
        line = self.process.stdout.readline()
        if not line:
            code = self.close()
            last = self.log.read_text().strip().splitlines()[-1:]
            return {"missing": f"its process ended with code {code} {' '.join(last)}"}
        return json.loads(line)

    def close(self) -> int:
        """End the process, if it has not ended, and tell its exit code."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        # Without an input it ends by itself, unless it is busy.
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=1)
        self.process.kill()
        return self.process.wait()

    def prepare(self, ref: Reference, method: str) -> Row:
        """Run a method for the first time, and check what it found."""
        problem = ref.problem
        answer = self.ask(do="prepare", method=method, folder=str(self.folder))
        row: Row = {
            "problem": problem.name,
            "library": self.library,
            "method": method,
        }
        if "evaluations" not in answer:
            reason = answer.get("error", answer.get("missing"))
            return {**row, "result": f"failed: {reason}"[:60]}
        with np.load(self.folder / "result.npz") as file:
            arrays = dict(file)
        gradient = {name: arrays[f"gradient_{name}"] for name in ref.gradient}
        residual = np.maximum(
            *(residuals(problem, arrays[name]) for name in ("z", "z_trained"))
        )
        error = ref.gradient_error(gradient)
        temp_bytes = answer["temp_bytes"]
        return {
            **row,
            "result": verdict(problem, residual, error, False),
            "evaluations": answer["evaluations"],
            "products": answer["products"],
            "residual": float(residual.max()),
            "gradient error": error,
            "first solve (s)": answer["solve_seconds"],
            "first solve + gradient (s)": answer["gradient_seconds"],
            "temp, JAX only (MB)": None if temp_bytes is None else temp_bytes / 1e6,
        }

    def timer(self, method: str, what: str) -> Callable[[float], float]:
        """A function that times a method, as `measure.interleave` takes it."""

        def seconds(estimate: float) -> float:
            number = max(1, round(SHORTEST_SECONDS / max(estimate, 1e-6)))
            answer = self.ask(do=what, method=method, number=number)
            return answer.get("seconds", math.inf)

        return seconds


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
        worker = Worker(library, python, folder, config.limit)
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
    return rows


def fastest(rows: list[Row], library: str, method: str = "") -> Row | None:
    """A library's fastest row of those timed, of the methods that begin as given."""
    timed = [
        row
        for row in rows
        if TIME in row
        and row["library"] == library
        and row["method"].startswith(method)
    ]
    return min(timed, key=lambda row: row[TIME], default=None)


def ratios(rows: list[Row]) -> list[Row]:
    """Our fastest method against each library's fastest, by algorithm and overall."""
    table = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        for algorithm in ("Anderson", "Broyden", ""):
            ours = fastest(chosen, OURS, algorithm)
            if ours is None:
                continue
            line: Row = {
                "problem": problem,
                "algorithm": algorithm or "fastest",
                "ours": ours["method"],
                "ours (ms)": ours[TIME],
                "over a bare loop": ours[TIME] / ours["bare loop (ms)"],
            }
            for library in dict.fromkeys(row["library"] for row in chosen):
                row = fastest(chosen, library, algorithm)
                if library != OURS and row is not None:
                    line[f"{library}, times ours"] = row[TIME] / ours[TIME]
            table.append(line)
    return table


def promises(name: str, rows: list[Row]) -> list[Row]:
    """What the library promises on a problem: how many times ours the others take.

    **Arguments:**

    - `name`: the problem's name in `PROBLEMS`.
    - `rows`: its table.
    """
    lines = []
    problem = rows[0]["problem"]
    libraries = {row["library"] for row in rows}

    def compare(what, ours, others, least):
        theirs = min((row[TIME] for row in others if TIME in row), default=math.inf)
        what = f"{problem}: {what}" + (" (failed)" if theirs == math.inf else "")
        times = 0.0 if ours is None else theirs / ours[TIME]
        lines.append(promise(what, times, least=least))

    if name in ("dense-0.9", "dense-0.99"):
        for library, method, least in ALGORITHMS:
            if library in libraries:
                key = library, method
                others = [r for r in rows if (r["library"], r["method"]) == key]
                ours = fastest(rows, OURS, method.split(",")[0])
                compare(f"{library}, {method}", ours, others, least)
    best = fastest(rows, OURS)
    if name in BEST and len(libraries) > 1:
        others = [row for row in rows if row["library"] != OURS]
        compare("the fastest of all", best, others, BEST[name])
    if name == "resnet":
        for library in libraries - {OURS}:
            others = [row for row in rows if row["library"] == library]
            least = 1.0 if library == "torchdeq" else 8.0
            compare(f"the fastest of {library}", best, others, least)
    if best is not None:
        over = best[TIME] / best["bare loop (ms)"]
        lines.append(promise(f"{problem}: ours over a bare loop", over, 1.35))
    return lines


def main() -> None:
    config = tyro.cli(Config)
    rows, lines = [], []
    for name in config.problems:
        problem = PROBLEMS[name](config.output_dir)
        with tempfile.TemporaryDirectory() as folder:
            new_rows = compare(config, problem, pathlib.Path(folder))
        shown = ("problem", "versions")
        print_table(
            problem.name,
            [{k: v for k, v in row.items() if k not in shown} for row in new_rows],
        )
        rows += new_rows
        lines += promises(name, new_rows)
    summary = ratios(rows)
    print_table("Times of the fastest, solve + gradient, relative to ours", summary)
    print_table("How many times ours the others take", lines)
    bars = [{**row, "label": f"{row['library']}: {row['method']}"} for row in rows]
    figure = bar_figure(
        bars,
        panel="problem",
        label="label",
        values=["solve (ms)", "solve + gradient (ms)"],
        unit="ms",
    )
    tables = {"rows": rows, "fastest": summary, "promises": lines}
    save(config, "peers", tables, figure, promise_figure(lines))


if __name__ == "__main__":
    main()
