"""All the options of a training run, and the plan that they make."""

import dataclasses
from pathlib import Path

from .data import Data, DataOptions
from .equilibrium import EquilibriumOptions
from .errors import check_fields, check_non_negative, check_positive, OptionError
from .networks import ModelConfig
from .optimiser import OptimiserOptions


@dataclasses.dataclass(frozen=True)
class JacobianOptions:
    """How strongly, and how often, the cell's Jacobian is kept small."""

    jacobian_weight: float = 0.0
    """Of the penalty, once the equilibrium is solved for."""
    jacobian_pretraining_weight: float = 0.0
    """Of the penalty before."""
    jacobian_increment: float = 0.1
    """By how much the weight grows ..."""
    jacobian_every: int | None = None
    """... in how many steps; by default it does not grow."""
    jacobian_probability: float = 1.0
    """In what part of the training steps the penalty counts."""
    jacobian_samples: int = 1
    """Random products for every estimate."""
    jacobian_last_epoch: float | None = None
    """After which epoch to go on without."""

    def __post_init__(self):
        check_non_negative(
            self,
            "jacobian_weight",
            "jacobian_pretraining_weight",
            "jacobian_increment",
            "jacobian_last_epoch",
        )
        check_positive(self, "jacobian_every", "jacobian_samples")
        check_fields(
            self,
            "in the interval [0, 1]",
            lambda value: 0 <= value <= 1,
            "jacobian_probability",
        )

    @property
    def active(self) -> bool:
        """Whether the penalty ever counts."""
        return self.jacobian_weight > 0 or self.jacobian_pretraining_weight > 0


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How long to train, and on what loss."""

    pretraining_epochs: float = 0.0
    """Epochs with the cell unrolled to a fixed depth."""
    pretraining_depth: int = 5
    """That depth."""
    epochs: float = 10.0
    """Epochs with the equilibrium, after the pretraining."""
    batch_size: int = 32
    """Examples, or streams of text, in a training step."""
    skip_weight: float = 0.0
    """Of the penalty on the distance from a solve's start to its end."""
    test_every: float = 1.0
    """Epochs from one evaluation to the next."""
    spectral_examples: int = 16
    """In an evaluation, the number of examples to know the spectral radius of."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self):
        check_non_negative(
            self,
            *("pretraining_epochs", "epochs", "skip_weight"),
            *("spectral_examples", "seed"),
        )
        check_positive(self, "pretraining_depth", "batch_size", "test_every")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What does not change the result: where it goes, and what computes it."""

    output_dir: Path | None = None
    """Folder of the metrics, the figures and the checkpoints; by default
    `runs/<model>-<dataset>-<seed>`. A run that was interrupted goes on from there."""
    checkpoint_every: int = 500
    """Training steps from one checkpoint to the next."""
    log_every: int = 50
    """Training steps that a line of the metrics is the mean of."""
    data_parallel: bool = False
    """Split every batch over all the devices."""
    distributed: bool = False
    """Work with other processes, which the cluster's environment tells of ..."""
    coordinator: str | None = None
    """... or, where there is none, at the address and port of the first process ..."""
    num_processes: int | None = None
    """... of so many ..."""
    process_id: int | None = None
    """... of which this is the one of this number, from 0."""

    def __post_init__(self):
        check_positive(self, "checkpoint_every", "log_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelConfig
    data: DataOptions = DataOptions()
    equilibrium: EquilibriumOptions = EquilibriumOptions()
    optimiser: OptimiserOptions = OptimiserOptions()
    jacobian: JacobianOptions = JacobianOptions()
    training: TrainingOptions = TrainingOptions()
    run: RunOptions = RunOptions()

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        if self.run.output_dir is not None:
            return self.run.output_dir
        model = type(self.model).__name__.removesuffix("Config").lower()
        return Path("runs") / f"{model}-{self.data.dataset}-{self.training.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the training does at which step."""

    steps_per_epoch: int
    pretraining_steps: int
    total_steps: int
    test_every: int

    @classmethod
    def of(cls, options: TrainingOptions, data: Data) -> "Plan":
        """The plan that the options make with a data set.

        **Raises:**

        `OptionError` if there is nothing to do.
        """
        steps_per_epoch = data.train.steps_per_epoch(options.batch_size)
        pretraining_steps = round(options.pretraining_epochs * steps_per_epoch)
        total_steps = pretraining_steps + round(options.epochs * steps_per_epoch)
        if total_steps == 0:
            raise OptionError(
                "There is no step to train: --epochs and --pretraining-epochs come to "
                f"less than one batch, and an epoch has {steps_per_epoch}."
            )
        return cls(
            steps_per_epoch,
            pretraining_steps,
            total_steps,
            max(1, round(options.test_every * steps_per_epoch)),
        )
