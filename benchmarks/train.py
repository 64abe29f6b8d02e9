"""Train any of the models on any of the data sets.

```bash
python benchmarks/train.py tutorial --dataset digits
python benchmarks/train.py tutorial --help
```

A run writes its metrics, figures and checkpoints into a folder. Started again with the
same options, it goes on from its last checkpoint, to exactly the same weights.
"""

import sys
from collections.abc import Sequence

import jax
import tyro
from checkpoints import CheckpointError
from data import DataError, load
from recipes import RECIPES
from trainer import Config, train


def parse(args: Sequence[str] | None = None) -> Config:
    """The run that a command line asks for."""
    return tyro.extras.overridable_config_cli(
        RECIPES,
        args=args,
        description=__doc__,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
    )


def main() -> None:
    config = parse()
    run = config.run
    if run.distributed:
        jax.distributed.initialize(run.coordinator, run.num_processes, run.process_id)
    try:
        train(config, load(config.data, config.training.seed))
    except (CheckpointError, DataError, ValueError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
