"""Train any of the models on any of the data sets.

```bash
python -m benchmarks.training tutorial --dataset mnist_subset
python -m benchmarks.training resnet --dataset fashion_mnist --data-dir fashion-mnist
python -m benchmarks.training transformer --data-dir book.txt
python -m benchmarks.training transformer --help
```

A run writes its metrics, its figures and its checkpoints into a folder. Started again
with the same options, it goes on from its last checkpoint, to exactly the same weights;
on GPUs that takes `XLA_FLAGS=--xla_gpu_deterministic_ops=true`. Ctrl-C and SIGTERM
finish the step and save. What decides a step of the training has to stay the same;
`--epochs` may grow, and the options of the tests may change. Needs the extra
`implicitnets[train]`.

```bash
python -m benchmarks.training tutorial --evaluate --best
python -m benchmarks.training tutorial --start-from runs/sciml-mnist_subset-0 \\
    --output-dir new
```
"""

import math
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from .command_line import parse_recipe
from .config import Config, RunOptions
from .data import load
from .errors import OptionError, RunError
from .interrupts import Stopped
from .recipes import RECIPES
from .records import read_records, Record
from .run import evaluate, train


def parse(args: Sequence[str] | None = None) -> Config:
    """The run that a command line asks for."""
    description = "Train any of the models on any of the data sets."
    return parse_recipe(RECIPES, description, args)


def connect(run: RunOptions) -> None:
    """Join the other processes, if the options say that there are any."""
    others = run.coordinator, run.num_processes, run.process_id
    if run.distributed:
        jax.distributed.initialize(*others)
    elif others != (None, None, None):
        raise OptionError(
            "--coordinator, --num-processes and --process-id go with --distributed."
        )


def show(metrics: Mapping[str, Any]) -> None:
    """Print what there is, one a line."""
    for name, value in metrics.items():
        print(f"{name:26} {math.nan if value is None else value:.4g}")


def last_record(folder: Path) -> Record:
    """What a run came to; nothing, if its metrics were removed."""
    for record in read_records(folder / "metrics.jsonl")[-1:]:
        return record | {"seconds_per_epoch": record["seconds"] / record["epoch"]}
    return {}


def run(config: Config) -> None:
    """Train or evaluate, and say what came of it."""
    connect(config.run)
    data, folder = load(config.data, config.training.seed), config.output_dir
    if config.run.evaluate:
        found = evaluate(config, data)
        written = "evaluation.json"
    else:
        train(config, data)
        found = last_record(folder) if jax.process_index() == 0 else {}
        written = "metrics.jsonl, training.png and checkpoints"
    if jax.process_index() == 0:
        show(found)
        print(f"Wrote {written} to {folder}.")


def main() -> None:
    try:
        run(parse())
    except Stopped as stopped:
        command = shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]])
        print(f"{stopped} To go on:\n{command}")
        sys.exit(stopped.status)
    except RunError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
