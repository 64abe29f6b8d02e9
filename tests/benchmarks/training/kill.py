"""Kill a training at random moments, and compare it with one in one piece.

```bash
python -m tests.benchmarks.training.kill --times 20
```

SIGTERM, SIGINT and SIGKILL take turns. A moment is drawn from all those of a process:
it may still import, compile, train, test or write. A run that ends before the last kill
is compared, and another one begins.
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


def main() -> None:
    options = tyro.cli(Options)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as base:
        folder = pathlib.Path(base) / "whole"
        began = time.monotonic()
        process = start(folder)
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        startup = time.monotonic() - began
        assert process.wait() == 0
        training = time.monotonic() - began - startup
        print(f"In one piece: {startup:.1f} s to begin, {training:.1f} s to train.")
        weights_before, records_before, total = result(folder)
        kills, runs, same = [], 0, True
        while len(kills) < options.times:
            runs += 1
            folder = pathlib.Path(base) / str(runs)
            finished = False
            while not finished:
                process = start(folder)
                if len(kills) < options.times:
                    # Three of four after it began to train.
                    rest = 0.3 * training
                    delay = startup * rng.choice((rng.random(), 1, 1, 1))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(delay + rng.random() * rest)
                    if process.poll() is None:
                        number = SIGNALS[len(kills) % len(SIGNALS)]
                        process.send_signal(number)
                        kills.append(number)
                        status = process.wait()
                        print(
                            f"{len(kills):3} {number.name:8} status {status:4}, "
                            f"metrics up to step {last_step(folder)} of {total}",
                            flush=True,
                        )
                status = process.wait()
                assert status in STATUS, status
                finished = status == 0
            found, records, step = result(folder)
            equal = np.array_equal(found, weights_before) and records == records_before
            same = same and equal and step == total
            print(f"Run {runs}: {'bit by bit the same' if equal else 'DIFFERENT'}.")
    print(
        f"{len(kills)} kills in {runs} runs: {'all' if same else 'NOT all'} the same."
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
