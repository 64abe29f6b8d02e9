"""Train models for as many steps of the same batches, to compare them."""

import statistics

from ..kit.tables import Row
from ..kit.timing import progress
from .config import Config
from .data import Data
from .fit import fit
from .metrics import means, Metrics
from .networks import num_parameters
from .trainer import Trainer


# Training steps that a point of a curve is the mean of.
WINDOW = 20


def train(
    config: Config, data: Data, name: str
) -> tuple[Row, dict[str, float], list[Metrics]]:
    """Train a model and test it.

    Returned are its row of a table, what the test found, and the metrics of every step.
    The time of a step is without compilation, and without pretraining if there is more.
    """
    trainer = Trainer(config, data)
    plan, clock = trainer.plan, trainer.clock
    first_timed = plan.pretraining_steps % plan.total_steps
    state, history, before = trainer.start(), [], 0.0
    for steps in (range(first_timed), range(first_timed, plan.total_steps)):
        before = clock.seconds
        state, found = fit(trainer.train_step, state, progress(steps, name), clock)
        history += found
    seconds = clock.seconds - before
    found = trainer.test(state)
    memory = trainer.training_memory(state.network.layer.fixed_depth)
    row = {
        "model": name,
        "parameters": num_parameters(state.network),
        "evaluations in training": means(history[-WINDOW:])["evaluations"],
        "evaluations": found["evaluations"],
        "residual": found["residual"],
        "spectral radius": found["spectral_radius_mean"],
        "training step (ms)": 1e3 * seconds / (plan.total_steps - first_timed),
        "training memory (MB)": 1e-6 * memory,
    }
    return row, found, history


def curve(name: str, histories: list[list[Metrics]], *columns: str) -> list[Row]:
    """How some metrics went in the course of a training, or in the mean of several."""
    rows = []
    for start in range(0, len(histories[0]) - WINDOW + 1, WINDOW):
        found = [means(history[start:][:WINDOW]) for history in histories]
        row = {c: statistics.mean(metrics[c] for metrics in found) for c in columns}
        rows.append({"model": name, "training step": start + WINDOW, **row})
    return rows
