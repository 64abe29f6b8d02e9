"""Kill a training at random moments, and compare it with one in one piece.

```bash
python -m tests.benchmarks.training.kill --times 20
```

SIGTERM, SIGINT and SIGKILL take turns. The process may import, compile, train, test or
write. A run that ends before the last kill is compared, and another one begins.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import tyro

from benchmarks.training import __main__ as script
from benchmarks.training.checkpoints import Checkpoints
from benchmarks.training.data import load
from benchmarks.training.records import read_records
from benchmarks.training.trainer import Trainer

from .helpers import weights, without_times


FLAGS = [
    "tanh",
    "--width=8",
    "--epochs=250",
    "--pretraining-epochs=50",
    "--batch-size=16",
    "--train-size=160",
    "--test-size=40",
    "--adjoint=jacobian-free",
    "--schedule=cosine",
    "--optimiser=adam",
    "--learning-rate=0.001",
    "--spectral-examples=0",
    "--test-every=7",
    "--checkpoint-every=90",
    "--log-every=20",
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
STATUS = {0, 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGKILL}
# Before the run has its handlers, a signal does what it does to any program.
STATUS |= {-signal.SIGTERM, -signal.SIGINT}


@dataclasses.dataclass(frozen=True)
class Options:
    """Kill a training at random moments."""

    times: int = 20
    """Kill so many times in all."""
    seed: int = 0
    """Draw the moments from this seed."""


def start(folder: pathlib.Path) -> subprocess.Popen:
    """A process that trains."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.training", *FLAGS, f"--output-dir={folder}"],
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def result(folder: pathlib.Path) -> tuple[np.ndarray, list, int]:
    """The state in the end, the metrics, and the number of steps."""
    config = script.parse([*FLAGS, f"--output-dir={folder}"])
    trainer = Trainer(config, load(config.data))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        found = checkpoints.newest(lambda s: checkpoints.restore(s, trainer.start()))
    assert found is not None
    step, state = found
    records = without_times(read_records(folder / "metrics.jsonl"))
    return np.asarray(weights(state)), records, step


def last_step(folder: pathlib.Path) -> int:
    """How far the metrics are."""
    records = read_records(folder / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def wait_for(process: subprocess.Popen, folder: pathlib.Path, step: int) -> None:
    """Wait until the metrics are past a step, or until the process ends."""
    while process.poll() is None and last_step(folder) < step:
        time.sleep(0.005)


def main() -> None:
    options = tyro.cli(Options)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as base:
        folder = pathlib.Path(base) / "whole"
        began = time.monotonic()
        process = start(folder)
        wait_for(process, folder, 1)
        startup = time.monotonic() - began
        assert process.wait() == 0
        weights_before, records_before, total = result(folder)
        num_kills, runs, same = 0, 0, True
        while num_kills < options.times:
            runs += 1
            folder = pathlib.Path(base) / str(runs)
            status = None
            while status != 0:
                process = start(folder)
                if num_kills < options.times:
                    if rng.random() < 0.25:
                        time.sleep(rng.random() * startup)
                    else:
                        most = total * rng.random() / 3
                        wait_for(process, folder, last_step(folder) + round(most))
                        time.sleep(0.1 * rng.random())
                    if process.poll() is None:
                        number = SIGNALS[num_kills % len(SIGNALS)]
                        process.send_signal(number)
                        num_kills += 1
                        status = process.wait()
                        print(
                            f"{num_kills:3} {number.name:8} status {status:4}, "
                            f"metrics up to step {last_step(folder)} of {total}",
                            flush=True,
                        )
                status = process.wait()
                assert status in STATUS, status
            found, records, step = result(folder)
            equal = np.array_equal(found, weights_before) and records == records_before
            same = same and equal and step == total
            print(f"Run {runs}: {'bit by bit the same' if equal else 'DIFFERENT'}.")
    verdict = "all" if same else "NOT all"
    print(f"{num_kills} kills in {runs} runs: {verdict} the same, bit by bit.")
    sys.exit(not same)


if __name__ == "__main__":
    main()
