"""This side of a worker: starts it, asks it, and checks its answers."""

import contextlib
import json
import math
import os
import pathlib
import select
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np

from ..kit.reference import Reference, residuals
from ..kit.rows import verdict
from ..kit.tables import Row
from ..kit.timing import SHORTEST_SECONDS


class Client:
    """A process with one library and one problem, started again when it has ended.

    One that takes too long is ended.

    **Arguments:**

    - `library`: its name.
    - `command`: what starts the process.
    - `folder`: where the problem is, and where results go.
    - `limit`: the seconds that it may take for an answer.
    """

    def __init__(
        self, library: str, command: list[str], folder: pathlib.Path, limit: float
    ):
        self.library = library
        self.command = command
        self.folder = folder
        self.limit = limit
        self.log = folder / f"{library}.log"
        self.hello = self._start()

    def _start(self) -> dict[str, Any]:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *self.command,
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
        """A function that times a method, as `timing.interleave` takes it."""

        def seconds(estimate: float) -> float:
            number = max(1, round(SHORTEST_SECONDS / max(estimate, 1e-6)))
            answer = self.ask(do=what, method=method, number=number)
            return answer.get("seconds", math.inf)

        return seconds
