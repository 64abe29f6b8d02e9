"""Optimisers and their schedules by name, for command lines."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import optax

from .errors import check_fields, check_non_negative, check_positive


OptimiserName = Literal["adam", "adamw", "radam", "sgd", "rmsprop", "adagrad"]
ScheduleName = Literal["constant", "cosine", "step", "inverse-sqrt"]


@dataclasses.dataclass(frozen=True)
class OptimiserOptions:
    """How the weights are changed."""

    optimiser: OptimiserName = "adam"
    """Use this optimiser. `adamw` adds weight decay to the step, and the others add it
    to the gradient. `rmsprop` corrects the bias of its first steps, as `adam` does."""
    learning_rate: float = 1e-3
    """Train at this learning rate, the highest of its schedule."""
    schedule: ScheduleName = "constant"
    """Change the learning rate by this schedule. `inverse-sqrt` falls as one over the
    square root of the step, from the end of the warm-up on."""
    warmup_steps: int = 0
    """Let the learning rate grow from zero for so many steps before its schedule."""
    last_learning_rate: float = 0.0
    """Cosine: end at this learning rate."""
    step_epochs: float = 30.0
    """Step: multiply the learning rate every so many epochs."""
    step_factor: float = 0.1
    """Step: multiply the learning rate by this."""
    momentum: float = 0.9
    """Use this momentum with `sgd`."""
    nesterov: bool = True
    """Look ahead as Nesterov does with `sgd`, or use plain momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Use these decay rates of the moments with `adam`, `adamw` and `radam`, and the
    second one with `rmsprop`."""
    weight_decay: float = 0.0
    """Decay the weights by this."""
    clip: float | None = None
    """Clip the gradient to this norm."""
    accumulate: int = 1
    """Change the weights once for the mean gradient of so many training steps."""

    def __post_init__(self):
        check_non_negative(self, "warmup_steps", "weight_decay", "last_learning_rate")
        check_positive(
            self,
            *("learning_rate", "step_epochs", "step_factor", "clip", "accumulate"),
        )
        check_fields(
            self, "in the interval [0, 1)", lambda value: 0 <= value < 1, "momentum"
        )
        check_fields(
            self,
            "in the interval [0, 1), both of them",
            lambda values: all(0 <= value < 1 for value in values),
            "betas",
        )
        if self.schedule == "cosine":
            check_fields(
                self,
                f"at most `learning_rate`, {self.learning_rate}",
                lambda value: value <= self.learning_rate,
                "last_learning_rate",
            )


def make_schedule(
    options: OptimiserOptions, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate at every step."""
    rate, warmup = options.learning_rate, options.warmup_steps

    def cosine():
        alpha = options.last_learning_rate / rate
        return optax.cosine_decay_schedule(rate, max(1, total_steps - warmup), alpha)

    def step():
        every = round(options.step_epochs * steps_per_epoch)
        return optax.exponential_decay(
            rate, max(1, every), options.step_factor, staircase=True
        )

    def inverse_sqrt():
        start = max(1, warmup)
        return lambda step: rate * math.sqrt(start) / jnp.sqrt(start + step)

    schedules: dict[ScheduleName, Callable[[], optax.Schedule]] = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": cosine,
        "step": step,
        "inverse-sqrt": inverse_sqrt,
    }
    schedule = schedules[options.schedule]()
    if warmup == 0:
        return schedule
    return optax.join_schedules(
        [optax.linear_schedule(0.0, rate, warmup), schedule], [warmup]
    )


def make_optimiser(
    options: OptimiserOptions, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser, with clipping in front of everything else."""
    b1, b2 = options.betas
    decay = optax.add_decayed_weights(options.weight_decay)
    optimisers: dict[OptimiserName, list[optax.GradientTransformation]] = {
        "adam": [decay, optax.scale_by_adam(b1, b2)],
        "adamw": [optax.scale_by_adam(b1, b2), decay],
        "radam": [decay, optax.scale_by_radam(b1, b2)],
        "sgd": [decay, optax.trace(options.momentum, options.nesterov)],
        "rmsprop": [decay, optax.scale_by_rms(b2, bias_correction=True)],
        "adagrad": [decay, optax.scale_by_rss()],
    }
    clip = [] if options.clip is None else [optax.clip_by_global_norm(options.clip)]
    # It counts the changes, and the schedule counts training steps.
    rate = optax.scale_by_learning_rate(lambda n: schedule(n * options.accumulate))
    optimiser = optax.chain(*clip, *optimisers[options.optimiser], rate)
    if options.accumulate == 1:
        return optimiser
    return optax.MultiSteps(optimiser, options.accumulate).gradient_transformation()
