"""Train any of the models on any of the data sets.

```bash
python -m benchmarks.training tutorial --dataset digits
python -m benchmarks.training resnet --dataset fashion_mnist --data-dir fashion-mnist
python -m benchmarks.training transformer --data-dir book.txt
python -m benchmarks.training transformer --help
```

A run writes its metrics, its figures and its checkpoints into a folder. Started again
with the same options, it goes on from its last checkpoint, to exactly the same weights;
on GPUs that takes `XLA_FLAGS=--xla_gpu_deterministic_ops=true`. Needs the extra
`implicitnets[train]`.
"""

import sys
from collections.abc import Sequence

import jax

from .command_line import parse_recipe
from .config import Config, RunOptions
from .data import load
from .errors import CheckpointError, DataError, OptionError
from .recipes import RECIPES
from .records import read_records
from .trainer import train


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


def main() -> None:
    try:
        config = parse()
        connect(config.run)
        train(config, load(config.data, config.training.seed))
    except (CheckpointError, DataError, OptionError) as error:
        sys.exit(f"Error: {error}")
    if jax.process_index() == 0:
        folder = config.output_dir
        last = read_records(folder / "metrics.jsonl")[-1]
        last["seconds_per_epoch"] = last["seconds"] / last["epoch"]
        for name, value in last.items():
            print(f"{name:26} {value:.4g}")
        print(f"Wrote metrics.jsonl, training.png and checkpoints to {folder}.")


if __name__ == "__main__":
    main()
