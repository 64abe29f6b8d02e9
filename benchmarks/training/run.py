"""A run from its start to its end: checkpoints, records, and what may interrupt it.

What a step does depends on its number and on the state alone, and a checkpoint has the
metrics that are not in a record yet. So a run that was killed goes on from its last
checkpoint to exactly the weights and the records that it would have had.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .checkpoints import check_facts, Checkpoints, WrongTreeError
from .config import Config, Plan, RunOptions
from .data import Data
from .errors import CheckpointError, DivergedError, writing
from .fit import Clock, fit
from .interrupts import Interrupts, Stopped
from .metrics import from_lists, means, Metrics, to_lists
from .progress import Progress
from .records import Record, Records, score, to_json
from .trainer import Trainer, TrainState


def tests_after(done: int, plan: Plan) -> bool:
    """Whether there is a test after so many steps."""
    return (
        done in (plan.pretraining_steps, plan.total_steps)
        or done % plan.test_every == 0
    )


def saves_after(done: int, plan: Plan, run: RunOptions) -> bool:
    """Whether there is a checkpoint after so many steps."""
    return done == plan.total_steps or done % run.checkpoint_every == 0


def between_records(
    plan: Plan, run: RunOptions, first: int, pending: bool
) -> Iterator[range]:
    """The steps from each record of the metrics to the next.

    If metrics are `pending`, there may be a record to write before the first step.
    """
    for done in range(first if pending else first + 1, plan.total_steps + 1):
        logs = done % run.log_every == 0
        if logs or tests_after(done, plan) or saves_after(done, plan, run):
            yield range(first, done)
            first = done


def train(config: Config, data: Data) -> TrainState:
    """Train, from the newest checkpoint if there is one, and write everything down.

    A signal stops it between two steps, with a checkpoint, and `Stopped` is raised. If
    it diverges, `DivergedError` is, and the last checkpoint is of finite weights.
    """
    folder, run = config.output_dir, config.run
    with writing(folder), Interrupts() as interrupts, contextlib.ExitStack() as opened:

        def closing_in_the_end(thing):
            return opened.enter_context(contextlib.closing(thing))

        trainer = Trainer(config, data)
        plan, facts = trainer.plan, trainer.facts()
        checkpoints = closing_in_the_end(Checkpoints(folder / "checkpoints"))
        first, state, pending = _begin(trainer, facts, checkpoints)
        active = jax.process_index() == 0
        # A record that is still to be written may be there, if it was at once killed.
        records = closing_in_the_end(Records(folder, first - bool(pending), active))
        if first > 0 and not records.all and active:
            print(f"The metrics before step {first} are missing.", file=sys.stderr)
        if records.all:
            last = records.all[-1]
            trainer.clock = Clock(last["seconds"], last["compile_seconds"])
        progress = closing_in_the_end(Progress(plan.total_steps, first, active))

        best = closing_in_the_end(Checkpoints(folder / "best"))

        def save(write, done, state, pending):
            if not _is_finite(state):
                raise _diverged("the weights are", done, checkpoints)
            write(done, state, {"facts": facts, "pending": to_lists(pending)})

        for steps in between_records(plan, run, first, bool(pending)):
            shown = progress.showing(interrupts.until(steps))
            state, history = fit(trainer.train_step, state, shown, trainer.clock)
            done, pending = steps.start + len(history), [*pending, *history]
            signal = interrupts.agree()
            if signal is not None:
                save(checkpoints.save, done, state, pending)
                raise Stopped(
                    f"Stopped after step {done} of {plan.total_steps}, and saved.",
                    signal,
                )
            record, pending = _measure(trainer, state, done, pending), []
            is_best = score(record) > max(map(score, records.all), default=-math.inf)
            records.add(record)
            progress.tell(record)
            if not math.isfinite(record["train_loss"]):
                raise _diverged("the loss is", done, checkpoints)
            if is_best:
                save(best.replace, done, state, pending)
            if saves_after(done, plan, run):
                save(checkpoints.save, done, state, pending)
    return state


def evaluate(config: Config, data: Data) -> dict[str, Any]:
    """Test what was trained, and write down what came out."""
    folder, source = config.output_dir, config.training.start_from
    trainer = Trainer(config, data)
    step, state = _trained(trainer, folder if source is None else source)
    if source is None:
        state = trainer.unrolled_for(state, step - 1)
    found = {f"test_{name}": value for name, value in trainer.test(state).items()}
    found = {"step": step, **found}
    if jax.process_index() == 0:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "evaluation.json").write_text(to_json(found))
    return found


def _begin(
    trainer: Trainer, facts: dict[str, Any], checkpoints: Checkpoints
) -> tuple[int, TrainState, list[Metrics]]:
    start, plan = trainer.start(), trainer.plan

    def load(step):
        notes = checkpoints.notes(step)
        check_facts(facts, notes["facts"], checkpoints.folder)
        return checkpoints.restore(step, start), from_lists(notes["pending"])

    newest = checkpoints.newest(load)
    if newest is None:
        source = trainer.config.training.start_from
        return 0, start if source is None else _trained(trainer, source)[1], []
    step, (state, pending) = newest
    if step > plan.total_steps:
        raise CheckpointError(
            f"The checkpoint in {checkpoints.folder} is of step {step}, and with these "
            f"--epochs a run has {plan.total_steps}: give more, or another "
            "--output-dir."
        )
    checkpoints.set_newer_aside(step)
    return step, trainer.unrolled_for(state, step - 1), pending


def _trained(trainer: Trainer, folder: Path) -> tuple[int, TrainState]:
    """A step, and the state before the first one but with the weights of that step."""
    name = "best" if trainer.config.training.best else "checkpoints"
    checkpoints = Checkpoints(folder / name, create=False)
    state = trainer.start()
    like = dataclasses.replace(state, memory=None, optimiser=None, step=None)
    is_own = trainer.config.training.start_from is None

    def load(step):
        notes = checkpoints.notes(step)
        if is_own:
            wanted, found = (
                {group: facts[group] for group in ("model", "data", "precision")}
                for facts in (trainer.facts(), notes["facts"])
            )
            check_facts(wanted, found, checkpoints.folder)
        try:
            return checkpoints.restore(step, like)
        except WrongTreeError as error:
            raise CheckpointError(
                f"The weights in {checkpoints.folder} do not fit: {error}."
            ) from error

    found = checkpoints.newest(load)
    if found is None:
        raise CheckpointError(f"There is no checkpoint in {checkpoints.folder}.")
    step, weights = found
    return step, dataclasses.replace(
        state, network=weights.network, statistics=weights.statistics
    )


def _measure(
    trainer: Trainer, state: TrainState, done: int, history: Sequence[Metrics]
) -> Record:
    """The record after so many steps, with a test if one is due."""
    clock = trainer.clock
    record: Record = {"step": done, "epoch": done / trainer.plan.steps_per_epoch}
    with clock.running():
        trained = means(history)
    record |= {f"train_{name}": value for name, value in trained.items()}
    record["learning_rate"] = float(np.asarray(trainer.schedule(done - 1)))
    if tests_after(done, trainer.plan) and math.isfinite(trained["loss"]):
        found = trainer.test(state)
        record |= {f"test_{name}": value for name, value in found.items()}
    record["seconds"] = clock.seconds
    record["compile_seconds"] = clock.compile_seconds
    return record


def _is_finite(state: TrainState) -> bool:
    changed = state.network, state.statistics, state.optimiser
    leaves = jtu.tree_leaves(eqx.filter(changed, eqx.is_inexact_array))
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


def _diverged(what: str, done: int, checkpoints: Checkpoints) -> DivergedError:
    latest = checkpoints.latest_step()
    kept = "no checkpoint" if latest is None else f"the checkpoint of step {latest}"
    return DivergedError(
        f"Training diverged: {what} not finite after step {done}. There is {kept} from "
        "before."
    )
