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
    """Weigh the penalty by this once training solves for the equilibrium."""
    jacobian_pretraining_weight: float = 0.0
    """Weigh the penalty by this during pretraining."""
    jacobian_increment: float = 0.1
    """Let the weight grow by this every `jacobian_every` steps."""
    jacobian_every: int | None = None
    """Let the weight grow after so many steps; by default it does not grow."""
    jacobian_probability: float = 1.0
    """Compute the penalty in a training step with this probability."""
    jacobian_samples: int = 1
    """Estimate the penalty from so many random products."""
    jacobian_last_epoch: float | None = None
    """Drop the penalty after this epoch; by default it stays."""

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
    """Train for so many epochs with the cell unrolled to a fixed depth."""
    pretraining_depth: int = 5
    """Unroll the cell to this depth in pretraining."""
    epochs: float = 10.0
    """Train for so many epochs with the equilibrium, after the pretraining."""
    batch_size: int = 32
    """Use so many examples, or streams of text, in a training step."""
    skip_weight: float = 0.0
    """Weigh the penalty on the distance from the start to the equilibrium by this."""
    l2_weight: float = 0.0
    """Add half the sum of the squared weights, times this, to the loss."""
    start_from: Path | None = None
    """Start from the weights in this folder of another run, not from random ones."""
    best: bool = False
    """Take the best checkpoint by its test, and not the newest one, with `--start-from`
    and with `--evaluate`."""
    test_every: float = 1.0
    """Evaluate after so many epochs."""
    test_every_steps: int | None = None
    """Evaluate after so many steps, and not by epochs."""
    test_batch_size: int | None = None
    """Use so many examples, or streams of text, at a time in an evaluation, by default
    as many as in training."""
    spectral_examples: int = 16
    """Estimate the spectral radius for so many examples in an evaluation."""
    seed: int = 0
    """Start the random numbers from this seed."""

    def __post_init__(self):
        check_non_negative(
            self,
            *("pretraining_epochs", "epochs", "skip_weight", "l2_weight"),
            "spectral_examples",
        )
        check_positive(
            self,
            *("pretraining_depth", "batch_size"),
            *("test_every", "test_every_steps", "test_batch_size"),
        )
        check_fields(
            self,
            "an integer from 0 to 2 ** 32 - 1",
            lambda value: 0 <= value < 2**32,
            "seed",
        )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What does not change the result: where it goes, and what computes it."""

    output_dir: Path | None = None
    """Write metrics, figures and checkpoints to this folder, by default
    `runs/<model>-<dataset>-<seed>`. An interrupted run continues from there, and one
    that was finished goes on if it is to have more epochs."""
    evaluate: bool = False
    """Do not train: test the checkpoint in the folder, and write the metrics to
    `evaluation.json`."""
    checkpoint_every: int = 500
    """Write a checkpoint after so many training steps."""
    log_every: int = 50
    """Write a line of metrics, their means, after so many training steps."""
    data_parallel: bool = False
    """Split every batch over all devices."""
    distributed: bool = False
    """Work with other processes. The cluster's environment or the next three options
    say which."""
    coordinator: str | None = None
    """Meet the other processes at this address and port of the first one."""
    num_processes: int | None = None
    """Expect so many processes."""
    process_id: int | None = None
    """Be the process of this number, from 0."""

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

    def __post_init__(self):
        reads = self.run.evaluate or self.training.start_from is not None
        if self.training.best and not reads:
            raise ValueError("`best` goes with `evaluate` or `start_from`.")

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
        """The plan that the options make with a data set."""
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
            options.test_every_steps
            or max(1, round(options.test_every * steps_per_epoch)),
        )
