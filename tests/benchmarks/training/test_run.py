"""What may happen to a run: signals, damage, full disks, divergence, and other uses."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.training import __main__ as script, records as records_module
from benchmarks.training.checkpoints import Checkpoints
from benchmarks.training.data import load
from benchmarks.training.errors import (
    CheckpointError,
    DivergedError,
    OptionError,
    OutputError,
)
from benchmarks.training.interrupts import Stopped
from benchmarks.training.records import read_records
from benchmarks.training.run import evaluate, train
from benchmarks.training.trainer import Trainer

from .helpers import weights, without_times


pytestmark = [
    pytest.mark.one_precision,
    # Orbax leaves some behind when it cannot read.
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Twenty steps, of which five are of pretraining.
FLAGS = [
    "tanh",
    "--width=4",
    "--epochs=3",
    "--pretraining-epochs=1",
    "--batch-size=16",
    "--train-size=80",
    "--test-size=20",
    "--max-steps=10",
    "--adjoint=jacobian-free",
    "--spectral-examples=0",
    "--schedule=constant",
    "--checkpoint-every=3",
    "--log-every=4",
]
RECORDS = [3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18, 20]
PROGRAMS = {}


@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    """Compile every program once, and draw no figures."""
    initialise = Trainer.__init__

    def with_programs(self, config, data):
        initialise(self, config, data)
        name = json.dumps([self.facts(), self.test_batch_size], default=str)
        self._compiled = PROGRAMS.setdefault(name, {})

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(Trainer, "__init__", with_programs)
        patch.setattr(records_module, "draw", lambda records: plt.figure())
        yield
    PROGRAMS.clear()


def run(folder, *flags, function=train):
    config = script.parse([*FLAGS, f"--output-dir={folder}", *flags])
    return function(config, load(config.data))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run in one piece: its folder, its state in the end and its metrics."""
    folder = tmp_path_factory.mktemp("reference")
    state = run(folder)
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == RECORDS
    return folder, state, records


@pytest.fixture
def copy(reference, tmp_path):
    """A copy of it, to damage."""
    shutil.copytree(reference[0], tmp_path / "copy")
    return tmp_path / "copy"


def check_same(folder, state, reference):
    np.testing.assert_array_equal(weights(state), weights(reference[1]))
    records = read_records(folder / "metrics.jsonl")
    assert without_times(records) == without_times(reference[2])


def at_step(monkeypatch, number, act):
    """Let something happen in a step, which returns another state or `None`."""
    take = Trainer.train_step

    def train_step(self, state, step):
        state, metrics = take(self, state, step)
        return (act(state) or state) if step == number else state, metrics

    monkeypatch.setattr(Trainer, "train_step", train_step)


# Signals.


# The step is the first one, in the middle of a record, before a record, before a
# record and a checkpoint, before a test.
@pytest.mark.parametrize(
    "number, step",
    [(signal.SIGINT, step) for step in (0, 6, 7, 8, 9)] + [(signal.SIGTERM, 6)],
)
def test_a_signal_stops_and_saves(reference, tmp_path, monkeypatch, number, step):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda state: signal.raise_signal(number))
        with pytest.raises(Stopped, match=f"after step {step + 1} of 20") as stopped:
            run(tmp_path)
    assert stopped.value.status == 128 + number
    assert signal.getsignal(number) == before
    assert len(read_records(tmp_path / "metrics.jsonl")) < len(RECORDS)
    # The second life is stopped too.
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda state: signal.raise_signal(number))
        with pytest.raises(Stopped, match="after step 13"):
            run(tmp_path)
    check_same(tmp_path, run(tmp_path), reference)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    # A shell starts what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def twice(state):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 1, twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda state: signal.raise_signal(signal.SIGTERM))
    flags = [*FLAGS, f"--output-dir={tmp_path / 'a run'}"]
    monkeypatch.setattr(sys, "argv", ["training", *flags])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "Stopped after step 6 of 20, and saved. To go on:" in said
    assert f"python -m benchmarks.training {' '.join(FLAGS)} '--output-dir=" in said


# Checkpoints.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def fill_with_garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [truncate, empty, fill_with_garbage, flip_a_bit, remove, replace_by_folder]


def arrays_of(checkpoint):
    (path,) = checkpoint.glob("state/d/*")  # Small ones are in their index.
    return path


def notes_of(checkpoint):
    return checkpoint / "notes" / "metadata"


def manifest_of(checkpoint):
    return checkpoint / "state" / "manifest.ocdbt"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", [arrays_of, notes_of])
def test_a_damaged_checkpoint(reference, copy, capsys, damage, part):
    """The one before it is taken, and what is damaged is kept."""
    damage(part(copy / "checkpoints" / "20"))
    if part is notes_of and damage is flip_a_bit:
        # One bit of a text may still be a text, but is another configuration.
        with pytest.raises(CheckpointError, match="is of a run with"):
            run(copy)
        return
    check_same(copy, run(copy), reference)
    assert "step 20 in" in capsys.readouterr().err
    assert (copy / "damaged-20").is_dir() and (copy / "checkpoints" / "20").is_dir()


def test_a_flipped_bit_is_never_read_as_another_number(tmp_path):
    """Orbax itself has no checksum of large arrays."""
    state = jax.random.normal(jax.random.key(0), (64, 64))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
    path = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    assert len(content) > 10_000
    checkpoints = Checkpoints(tmp_path)
    np.testing.assert_array_equal(checkpoints.restore(1, state), state)
    for place in range(100, len(content), 1000):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        with pytest.raises(CheckpointError, match="No checkpoint"):
            checkpoints.newest(lambda step: checkpoints.restore(step, state))


def test_a_checkpoint_with_arrays_of_another_model(reference, copy, tmp_path, capsys):
    run(tmp_path / "other", "--width=5")
    damaged, other = (f / "checkpoints" / "20" for f in (copy, tmp_path / "other"))
    shutil.rmtree(damaged / "state")
    shutil.copytree(other / "state", damaged / "state")
    notes = json.loads(notes_of(damaged).read_text())
    notes["arrays"] = json.loads(notes_of(other).read_text())["arrays"]
    notes_of(damaged).write_text(json.dumps(notes))
    check_same(copy, run(copy), reference)
    said = capsys.readouterr().err
    assert "is float32[5, 64], and this model's is float32[4, 64]" in said


def test_no_whole_checkpoint(copy):
    for folder in (copy / "checkpoints").iterdir():
        truncate(manifest_of(folder))
    with pytest.raises(
        CheckpointError, match=r"No checkpoint .*\(step 20: .*; step 18: "
    ):
        run(copy)
    assert len(list((copy / "checkpoints").iterdir())) == 2


# What is written.


def test_an_output_folder_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for folder in (path, path / "inside"):
        with pytest.raises(OutputError, match="cannot be written .*Not a directory"):
            run(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(OutputError, match="checkpoints cannot be written"):
        run(tmp_path / "run")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_metrics_that_cannot_be_written(reference, tmp_path, monkeypatch, code):
    opened = pathlib.Path.open

    def fail(self, *args, **kwargs):
        if args == ("a",) and self.read_bytes().count(b"\n") == 7:
            raise OSError(code, os.strerror(code), str(self))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", fail)
        with pytest.raises(OutputError, match=f"jsonl cannot.*{os.strerror(code)}"):
            run(tmp_path)
    check_same(tmp_path, run(tmp_path), reference)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: No space left on device"),  # as TensorStore
    ],
)
def test_a_checkpoint_on_a_full_disk(reference, tmp_path, monkeypatch, error):
    save = ocp.CheckpointManager.save

    def fail(self, step, **kwargs):
        if step == 12:
            raise error
        return save(self, step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(OutputError, match="cannot be .*No space left on device"):
            run(tmp_path)
    check_same(tmp_path, run(tmp_path), reference)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x00binary\x00\n", "Line 1 of .* is no record"),
        (b"\x80\x00binary", "Line 1 of .* is no record"),
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "Line 2 of .* is no record"),
        (b'{"step": 1}\n[2]\n{"step": 3}\n', "Line 2 of .* is no record"),
        (b'{"step": 1}\n{"step": null}\n', "Line 2 of .* is no record"),
    ],
)
def test_broken_metrics(copy, content, message):
    path = copy / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=message):
        run(copy)
    assert path.read_bytes() == content


def test_metrics_that_are_a_folder(copy):
    path = copy / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="metrics.jsonl cannot be read"):
        run(copy)


def test_missing_metrics(copy, monkeypatch, capsys):
    """The run still goes on, and a finished one ends without an error."""
    (copy / "metrics.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["", *FLAGS, f"--output-dir={copy}"])
    script.main()
    run(copy, "--epochs=4")
    steps = [record["step"] for record in read_records(copy / "metrics.jsonl")]
    assert steps == [21, 24, 25]
    assert "metrics before step 20 are missing" in capsys.readouterr().err


def test_metrics_after_a_kill_in_mid_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    for end in ('{"st', '{"step": 3, "loss": 0.', ""):
        path.write_text('{"step": 1}\n{"step": 2}\n' + end)
        assert read_records(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


# Divergence.


def no_constants(name):
    raise ValueError(name)


def poisoned(state):
    def spoil(leaf):
        return leaf * jnp.nan if eqx.is_inexact_array(leaf) else leaf

    return dataclasses.replace(state, network=jtu.tree_map(spoil, state.network))


@pytest.mark.parametrize(
    "step, message, kept",
    [
        (9, "the loss is not finite after step 12.* of step 9 ", ["6", "9"]),
        # The loss of the step before is finite, and its weights are not.
        (8, "the weights are not finite after step 9.* of step 6 ", ["3", "6"]),
        (0, "the loss is not finite after step 3. There is no checkpoint", []),
    ],
)
def test_divergence(reference, tmp_path, monkeypatch, step, message, kept):
    with monkeypatch.context() as patch:
        at_step(patch, step, poisoned)
        with pytest.raises(DivergedError, match=message) as error:
            run(tmp_path)
    assert error.value.status == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == kept
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constants)
    check_same(tmp_path, run(tmp_path), reference)


def test_the_exit_status_of_divergence(tmp_path, monkeypatch):
    at_step(monkeypatch, 3, poisoned)
    monkeypatch.setattr(sys, "argv", ["", *FLAGS, f"--output-dir={tmp_path}"])
    with pytest.raises(SystemExit, match="Error: Training diverged"):
        script.main()


# Trained models.


def test_evaluate(reference, copy, monkeypatch, capsys):
    _, _, records = reference
    before = sorted(copy.rglob("*"))
    flags = [*FLAGS, f"--output-dir={copy}", "--evaluate"]
    monkeypatch.setattr(sys, "argv", ["", *flags])
    script.main()
    path = copy / "evaluation.json"
    found = json.loads(path.read_text())
    assert found.pop("step") == 20
    assert found == {name: records[-1][name] for name in found}
    assert f"{'test_loss':26} {found['test_loss']:.4g}" in capsys.readouterr().out
    assert sorted(copy.rglob("*")) == sorted([*before, path])
    # Other options of tests, another solver and another optimiser.
    other = run(
        copy,
        *("--evaluate", "--test-batch-size=7", "--solver=anderson", "--atol=0"),
        *("--test-rtol=1e-6", "--test-max-steps=50", "--optimiser=adam"),
        function=evaluate,
    )
    np.testing.assert_allclose(other["test_loss"], found["test_loss"], rtol=1e-3)
    assert other["test_residual"] < 1e-5
    with pytest.raises(CheckpointError, match="data.checksum = "):
        run(copy, "--evaluate", "--train-size=70", function=evaluate)


def test_evaluate_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no folder .* with checkpoints"):
        run(tmp_path / "new", "--evaluate", function=evaluate)
    assert not (tmp_path / "new").exists()


def test_the_best_checkpoint(reference):
    folder, _, records = reference
    tests = [record for record in records if "test_accuracy" in record]
    best = max(tests, key=lambda record: record["test_accuracy"])
    assert [p.name for p in (folder / "best").iterdir()] == [str(best["step"])]
    found = run(folder, "--evaluate", "--best", function=evaluate)
    assert found["step"] == best["step"]
    assert found["test_accuracy"] == best["test_accuracy"]
    (folder / "evaluation.json").unlink()


def test_what_is_best():
    score = records_module.score
    assert score({"test_accuracy": 0.5, "test_loss": 1.0}) == 0.5
    assert score({"test_accuracy": 0.5, "test_mean_iou": 0.2}) == 0.2
    text = {"test_accuracy": 0.5, "test_loss": 1.5, "test_perplexity": 4.5}
    assert score(text) == -1.5
    for none in ({}, {"test_accuracy": None}, {"test_accuracy": float("nan")}):
        assert score(none) == -float("inf")


def test_start_from(reference, tmp_path, monkeypatch):
    folder, state, _ = reference
    started = []

    def take(state):
        started.append(state)
        signal.raise_signal(signal.SIGTERM)

    source = f"--start-from={folder}"
    at_step(monkeypatch, 0, take)
    flags = (source, "--learning-rate=0.0001", "--optimiser=adam")
    with pytest.raises(Stopped, match="after step 1 "):
        run(tmp_path, *flags)
    network, trained = (weights(s.network) for s in (started[0], state))
    assert 0 < np.max(np.abs(network - trained)) < 1e-3
    assert int(started[0].step) == 1
    # Goes on by itself, and not from other weights.
    with pytest.raises(CheckpointError, match="training.start_from = "):
        run(tmp_path, *flags[1:])
    with pytest.raises(CheckpointError, match=r"do not fit: .* float32\[4, 64\], and"):
        run(tmp_path / "other", source, "--width=5")
    with pytest.raises(OptionError, match="--best goes with --evaluate or"):
        run(tmp_path / "other", "--best")


def test_longer_runs(reference, tmp_path):
    """As long as the schedule is the same, as if it had been asked for at once."""
    _, state, records = reference
    run(tmp_path, "--epochs=2")
    longer = run(tmp_path, "--test-every=10", "--log-every=1", "--test-rtol=0.1")
    np.testing.assert_array_equal(weights(longer), weights(state))
    with pytest.raises(CheckpointError, match="of step 20, and with .* has 10: give"):
        run(tmp_path, "--epochs=1")


def test_evaluation_interval_in_steps(tmp_path):
    run(tmp_path, "--test-every-steps=7", "--test-size=15", "--test-batch-size=10")
    records = read_records(tmp_path / "metrics.jsonl")
    tests = [record["step"] for record in records if "test_loss" in record]
    assert tests == [5, 7, 14, 20]


# What is said.


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress(tmp_path, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    run(tmp_path)
    said = capsys.readouterr()
    steps = [line.split(":")[0] for line in said.out.splitlines()]
    assert steps == ([] if is_terminal else [f"step {n} of 20" for n in RECORDS])
    assert ("20/20" in said.err) == is_terminal
