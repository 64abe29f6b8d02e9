"""The training script: what it computes, and that it goes on after it was killed."""

import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import time
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import implicitnets as inn
from benchmarks.training import __main__ as script
from benchmarks.training.command_line import parse_settings
from benchmarks.training.config import (
    Config,
    JacobianOptions,
    Plan,
    RunOptions,
    TrainingOptions,
)
from benchmarks.training.data import Data, DataOptions, Examples, load, Text
from benchmarks.training.equilibrium import (
    ADJOINTS,
    EquilibriumOptions,
    LINEAR_SOLVERS as LINEAR,
    make_solver,
    SOLVERS,
)
from benchmarks.training.errors import CheckpointError, DataError, OptionError
from benchmarks.training.metrics import means
from benchmarks.training.networks import build
from benchmarks.training.optimiser import (
    make_optimiser,
    make_schedule,
    OptimiserName,
    OptimiserOptions,
)
from benchmarks.training.recipes import RECIPES, SMALL_TRANSFORMER
from benchmarks.training.records import draw, read_records
from benchmarks.training.run import train
from benchmarks.training.sciml import SciMLConfig
from benchmarks.training.trainer import (
    jacobian_schedule,
    judge_batch,
    Trainer,
    with_random_budget,
)
from implicitnets.models import (
    CausalTransformerConfig,
    MDEQConfig,
    ResNetConfig,
    TanhConfig,
)

from ...library.helpers import tolerance, two_norm
from .helpers import weights, without_times


pytestmark = pytest.mark.one_precision


MODULE = "benchmarks.training"
FLAGS = [
    "tanh",
    "--width=8",
    "--solver=anderson",
    "--epochs=2",
    "--pretraining-epochs=1",
    "--batch-size=16",
    "--learning-rate=0.5",
    "--train-size=160",
    "--test-size=40",
    "--jacobian-weight=1",
    "--jacobian-probability=0.5",
    "--skip-weight=0.1",
    "--schedule=cosine",
    "--clip=1",
    "--log-every=1",
    "--checkpoint-every=3",
    "--spectral-examples=20",  # of two batches
]


@pytest.fixture(scope="module", autouse=True)
def lenient_promotion():
    """Optax' schedules multiply integers by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The training is the same without: less to compile.
QUICKER = ["--spectral-examples=0", "--test-every=100"]


def parse(*flags):
    return script.parse([*FLAGS, *map(str, flags)])


def start_script(*flags, **environment):
    # The compiled programs' threads would each take all the cores.
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *FLAGS, *map(str, flags)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run in one piece: its folder, its state in the end and its metrics."""
    folder = tmp_path_factory.mktemp("reference")
    config = parse("--output-dir", folder)
    state = train(config, load(config.data))
    return folder, state, read_records(folder / "metrics.jsonl")


def test_run(reference):
    folder, state, records = reference
    assert [record["step"] for record in records] == list(range(1, 31))
    pretraining, implicit = records[:10], records[10:]
    assert {record["train_evaluations"] for record in pretraining} == {5}
    assert 5 not in {record["train_evaluations"] for record in implicit}
    assert min(record["train_converged"] for record in implicit) == 1
    assert implicit[-1]["train_loss"] < 0.8 * records[0]["train_loss"]
    tests = [record for record in records if "test_loss" in record]
    assert [record["step"] for record in tests] == [10, 20, 30]
    for record in tests:
        assert 0 < record["test_spectral_radius_mean"]
        assert record["test_spectral_radius_mean"] <= record["test_spectral_radius_max"]
    assert int(state.step) == 30
    for axis in draw(records).axes:
        for line in axis.get_lines():
            assert np.isfinite(line.get_xydata()).all() and len(line.get_xydata()) > 1
    plt.close("all")
    assert (folder / "training.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())


def test_killed_run_goes_on_bit_by_bit(reference, tmp_path):
    _, state, records = reference
    process = start_script("--output-dir", tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    while len(read_records(metrics)) < 17:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(read_records(metrics)) < 30

    config = parse("--output-dir", tmp_path)
    resumed = train(config, load(config.data))
    np.testing.assert_array_equal(weights(resumed), weights(state))
    assert without_times(read_records(metrics)) == without_times(records)


def test_finished_run_is_left_alone(reference):
    folder, state, records = reference
    config = parse("--output-dir", folder)
    np.testing.assert_array_equal(
        weights(train(config, load(config.data))), weights(state)
    )
    assert read_records(folder / "metrics.jsonl") == records


@pytest.mark.parametrize(
    "flag, difference",
    [
        ("--learning-rate=0.2", "optimiser.learning_rate = 0.5, and this one has 0.2"),
        ("--train-size=170", "data.checksum = "),
        ("--solver=broyden", "equilibrium.solver = anderson"),
    ],
)
def test_other_configuration_is_refused(reference, flag, difference):
    folder, _, _ = reference
    config = parse("--output-dir", folder, flag)
    with pytest.raises(CheckpointError, match=difference) as error:
        train(config, load(config.data))
    assert "\n" not in str(error.value)


def same_curve(records, others):
    """An example may need a step more on other devices: losses do not tell."""
    losses, other_losses = ([r["train_loss"] for r in rs] for rs in (records, others))
    np.testing.assert_allclose(losses, other_losses, rtol=tolerance(1e-3, 1e-8))


def test_two_processes_of_two_devices(reference, tmp_path):
    _, _, records = reference
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    two_devices = "--xla_force_host_platform_device_count=2"
    processes = [
        start_script(
            "--output-dir",
            tmp_path,
            "--data-parallel",
            *QUICKER,
            "--distributed",
            f"--coordinator=localhost:{port}",
            "--num-processes=2",
            f"--process-id={number}",
            XLA_FLAGS=f"{os.environ['XLA_FLAGS']} {two_devices}",
        )
        for number in range(2)
    ]
    # A signal to one stops all, after the same step.
    metrics = tmp_path / "metrics.jsonl"
    while len(read_records(metrics)) < 2:
        assert processes[0].poll() is None, processes[0].communicate()[0].decode()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 128 + signal.SIGTERM, output.decode()
    assert 2 <= len(read_records(metrics)) < 30
    # What four devices wrote, one can go on from.
    config = parse("--output-dir", tmp_path, *QUICKER)
    train(config, load(config.data))
    same_curve(records, read_records(metrics))


def test_batch_and_devices_must_fit(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: 3 * [jax.local_devices()[0]])
    config = parse("--data-parallel")
    with pytest.raises(OptionError, match="multiple of the 3 devices; got"):
        Trainer(config, load(config.data))


# The options.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_defaults_of_the_command_line(name):
    assert script.parse([name]) == RECIPES[name][1]


def test_one_sentence_for_what_cannot_be_read(monkeypatch, tmp_path):
    flags = ["training", "tanh", "--dataset=mnist", f"--data-dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="Error: .* has no file") as error:
        script.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["tanh", "--epochs=-1"], "--epochs must be non-negative .*; got -1.0."),
        (["tanh", "--width=0"], "--width must be an integer of at least 1; got 0."),
        (["tutorial", "--channels=0"], "--channels must be positive; got 0."),
        (["mdeq-tiny", "--groups=5"], "--groups must be a divisor .*; got 5."),
        (["tanh", "--max-steps=3", "--max-steps-delta=3"], "less than --max-steps, 3;"),
        (["tanh", "--data-dir=x"], "--data-dir does not go with --dataset digits"),
        (["tanh", "--history-size=3"], "--history-size .* with --solver fixed-point"),
        (["tutorial", "--history-size=0"], "--history-size must be an integer of at "),
        (["tutorial", "--ridge=0"], "--ridge must be .* positive number; got 0.0"),
        (["tutorial", "--solver=newton", "--damping=0.1"], "--damping does not go"),
        (["tanh", "--adjoint=phantom", "--adjoint-solver=lu"], "not with --adjoint "),
        (["resnet", "--learning-rate=1e-9"], "at most --learning-rate, 1e-09; got"),
        (["tanh", "--betas", "0.9", "nan"], "--betas must be in"),
        *(
            (["tutorial", f"--{name}={value}"], f"--{name} must be .*; got {value}")
            for name in (
                *("learning-rate", "clip", "rtol", "atol", "adjoint-rtol"),
                *("weight-decay", "skip-weight", "l2-weight", "momentum"),
                *("step-factor", "step-epochs", "last-learning-rate", "epochs"),
                *("pretraining-epochs", "test-every", "jacobian-weight"),
            )
            for value in ("nan", "inf", "-inf", "-1.0")
        ),
        *(
            (["tutorial", f"--{name}={value}"], f"--{name} must be .*; got {value}")
            for name, value in (
                *(("seed", -1), ("seed", 2**32), ("warmup-steps", -1)),
                *(("test-batch-size", 0), ("test-every-steps", 0)),
                *(("test-sequence-length", 0), ("test-max-steps", 0)),
                *(("momentum", 1.0), ("learning-rate", 0.0), ("clip", 0.0)),
            )
        ),
    ],
)
def test_a_wrong_option_names_its_flag(flags, sentence):
    with pytest.raises(OptionError, match=sentence):
        script.parse(flags)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epochs=x"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--betas", "1"], "--betas"),
        (["--clip=x"], "--clip"),
        (["--seed=1.5"], "--seed"),
        (["--solver=x"], "--solver"),
        (["--bogus=1"], "--bogus"),
    ],
)
def test_what_cannot_be_parsed_names_its_flag(flags, named, capsys):
    for parse in (
        lambda: script.parse(["tanh", *flags]),
        lambda: parse_settings(RECIPES["tanh"][1].training, flags),
    ):
        with pytest.raises(SystemExit):
            parse()
        said = capsys.readouterr().err
        assert named in said and "dummy" not in said


@pytest.mark.parametrize("name", RECIPES)
def test_what_follows_from_the_data_is_no_option(name, capsys):
    with pytest.raises(SystemExit):
        script.parse([name, "--help"])
    shown = capsys.readouterr().out
    for flag in ("image-shape", "in-channels", "length", "num-classes", "vocab-size"):
        assert f"--{flag}" not in shown


@pytest.mark.parametrize(
    "options, name, value",
    [
        (TrainingOptions, "epochs", -1),
        (TrainingOptions, "epochs", math.nan),
        (TrainingOptions, "batch_size", 0),
        (TrainingOptions, "skip_weight", -0.1),
        (JacobianOptions, "jacobian_weight", -1.0),
        (JacobianOptions, "jacobian_probability", 1.1),
        (JacobianOptions, "jacobian_samples", 0),
        (JacobianOptions, "jacobian_every", 0),
        (EquilibriumOptions, "max_steps", 0),
        (EquilibriumOptions, "max_steps_delta", 30),
        (EquilibriumOptions, "test_max_steps", 0),
        (EquilibriumOptions, "adjoint_max_steps", 0),
        (EquilibriumOptions, "rtol", -1e-3),
        (EquilibriumOptions, "adjoint_damping", 1.0),
        (RunOptions, "log_every", 0),
        (OptimiserOptions, "clip", 0.0),
        (OptimiserOptions, "warmup_steps", -1),
        (OptimiserOptions, "accumulate", 0),
    ],
)
def test_options_are_checked(options, name, value):
    with pytest.raises(ValueError, match=name):
        options(**{name: value})


def test_nothing_to_train():
    digits = load(DataOptions(train_size=40))
    with pytest.raises(OptionError, match="no step to train"):
        Plan.of(TrainingOptions(epochs=0), digits)


def test_part_of_a_cluster():
    with pytest.raises(OptionError, match="go with --distributed"):
        script.connect(RunOptions(num_processes=2))


PLAN = Plan(steps_per_epoch=10, pretraining_steps=20, total_steps=100, test_every=10)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(schedule="constant"), {0: 1, 99: 1}),
        (dict(schedule="cosine"), {0: 1, 50: 0.5, 100: 0}),
        (dict(schedule="cosine", last_learning_rate=0.2), {50: 0.6, 100: 0.2}),
        (dict(schedule="step", step_epochs=3), {29: 1, 30: 0.1, 60: 0.01}),
        (dict(schedule="cosine", warmup_steps=20), {0: 0, 10: 0.5, 20: 1, 60: 0.5}),
        (dict(schedule="inverse-sqrt"), {0: 1, 3: 0.5, 99: 0.1}),
        (dict(schedule="inverse-sqrt", warmup_steps=4), {2: 0.5, 4: 1, 16: 0.5}),
    ],
)
def test_schedules(options, expected):
    options = OptimiserOptions(learning_rate=1.0, **options)
    schedule = make_schedule(options, PLAN.total_steps, PLAN.steps_per_epoch)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_optimisers_descend_and_decay(name):
    options = OptimiserOptions(name, learning_rate=0.1, weight_decay=0.5, clip=1.0)
    optimiser = make_optimiser(options, optax.constant_schedule(0.1))
    point = jnp.ones(2)
    for gradient in (jnp.full(2, 1e6), jnp.zeros(2)):
        updates, _ = optimiser.update(gradient, optimiser.init(point), point)
        updates = np.asarray(updates)
        assert (updates < 0).all() and (updates > -0.3).all()


def updates_for(options, *gradients):
    """The steps that an optimiser takes at the point one."""
    optimiser = make_optimiser(options, optax.constant_schedule(options.learning_rate))
    state, found = optimiser.init(jnp.ones(1)), []
    for gradient in gradients:
        update, state = optimiser.update(jnp.full(1, gradient), state, jnp.ones(1))
        found.append(update.item())
    return found


def test_other_optimisers():
    """As they are defined, for the gradients 2 and 3."""
    options = OptimiserOptions("sgd", learning_rate=0.1, momentum=0.5, nesterov=False)
    np.testing.assert_allclose(updates_for(options, 2.0, 3.0), [-0.2, -0.4], rtol=1e-6)
    options = dataclasses.replace(options, nesterov=True)
    np.testing.assert_allclose(updates_for(options, 2.0, 3.0), [-0.3, -0.5], rtol=1e-6)
    options = OptimiserOptions("rmsprop", learning_rate=0.1, betas=(0.9, 0.75))
    expected = [-0.2 / 2, -0.3 / math.sqrt((0.75 + 2.25) / (1 - 0.75**2))]
    np.testing.assert_allclose(updates_for(options, 2.0, 3.0), expected, rtol=1e-5)
    options = OptimiserOptions("adagrad", learning_rate=0.1)
    expected = [-0.2 / math.sqrt(4.1), -0.3 / math.sqrt(13.1)]
    np.testing.assert_allclose(updates_for(options, 2.0, 3.0), expected, rtol=1e-5)


def test_gradients_accumulate():
    """Two steps change the weights once, by their mean gradient, at the rate of their
    place in the schedule."""
    options = OptimiserOptions("sgd", momentum=0.0, accumulate=2)
    optimiser = make_optimiser(options, lambda step: 0.1 * (1 + step))
    point = jnp.ones(2)
    state = optimiser.init(point)
    found = []
    for gradient in (1.0, 3.0, 2.0, 4.0):
        updates, state = optimiser.update(jnp.full(2, gradient), state, point)
        found.append(np.asarray(updates))
    np.testing.assert_allclose(found[0], 0)
    np.testing.assert_allclose(found[1], -0.1 * 2, rtol=1e-6)
    np.testing.assert_allclose(found[2], 0)
    np.testing.assert_allclose(found[3], -0.3 * 3, rtol=1e-6)


def test_jacobian_schedule():
    options = JacobianOptions(
        jacobian_weight=1.0,
        jacobian_pretraining_weight=0.1,
        jacobian_increment=0.5,
        jacobian_every=30,
        jacobian_last_epoch=9,
    )
    schedule = jacobian_schedule(options, PLAN)
    found = [schedule(step) for step in (0, 19, 20, 49, 50, 89, 90)]
    np.testing.assert_allclose(found, [0.1, 0.1, 1, 1, 1.5, 2, 0], rtol=1e-6)


# The models.


def image_data(size, channels, classes, masks):
    rng = np.random.default_rng(0)
    inputs = rng.random((4, channels, size, size), np.float32)
    shape = (4, size, size) if masks else (4,)
    targets = rng.integers(0, classes, shape, np.int32)
    return Data(Examples(inputs, targets), Examples(inputs[:3], targets[:3]), classes)


TEXT = Text(np.arange(30, dtype=np.int32) % 3, length=4)
MDEQ = MDEQConfig((2, 2), (1, 1), 4, num_downsamples=1, expansion=1, groups=2)
# Of the solvers and adjoints, the quickest to compile.
QUICK = EquilibriumOptions("fixed-point", max_steps=4, adjoint="jacobian-free")
# No solver at all.
UNROLLED = TrainingOptions(
    pretraining_epochs=9, pretraining_depth=1, batch_size=2, spectral_examples=0
)


def test_batch_normalisation():
    model = ResNetConfig(channels=2, inner_channels=2, groups=2)
    config = Config(model, training=UNROLLED)
    trainer = Trainer(config, image_data(8, 1, 3, False))
    start = trainer.start()
    state, metrics = trainer.train_step(start, 0)
    assert all(np.isfinite(value) for value in means([metrics]).values())
    assert not np.array_equal(weights(state.network), weights(start.network))
    assert not np.array_equal(weights(state.statistics), weights(start.statistics))


def test_segmentation():
    equilibrium = dataclasses.replace(QUICK, test_max_steps=6)
    options = TrainingOptions(batch_size=2, spectral_examples=0)
    trainer = Trainer(
        Config(MDEQ, equilibrium=equilibrium, training=options),
        image_data(8, 1, 3, True),
    )
    found = trainer.test(trainer.start())
    assert all(np.isfinite(value) for value in found.values())
    assert 0 <= found["mean_iou"] <= found["accuracy"] <= 1
    assert QUICK.max_steps < found["steps"] <= 6


def test_memory_of_text():
    """Segments are remembered in training and in tests, from the beginning on."""
    model = dataclasses.replace(
        SMALL_TRANSFORMER,
        width=4,
        num_heads=1,
        head_width=4,
        inner_width=4,
        memory_length=5,
        dropout=0.0,
    )
    config = Config(model, training=UNROLLED)
    trainer = Trainer(config, Data(TEXT, TEXT, 3))
    state = trainer.start()
    for step, num_positions in enumerate((4, 5, 5, 4)):
        state, _ = trainer.train_step(state, step)
        assert list(state.memory.num_positions) == 2 * [num_positions]
    assert trainer.training_memory(fixed_depth=1) > 0
    found = trainer.test(state)
    np.testing.assert_allclose(found["perplexity"], 2 ** found["bits_per_token"])


@pytest.mark.parametrize(
    "model, data",
    [
        (SciMLConfig(model_type="skipregdeq", channels=2), image_data(8, 1, 3, False)),
        (MDEQ, image_data(8, 3, 3, False)),
        (CausalTransformerConfig(width=8, num_heads=2), Data(TEXT, TEXT, 3)),
    ],
)
def test_other_models(model, data):
    network, statistics = build(model, QUICK, data, key=jr.key(0))
    batch = data.train.training_batch(0, 2, 0)
    verdict, _ = eqx.filter_jit(judge_batch)(
        network, statistics, network.memory, batch, jr.key(0)
    )
    assert verdict.loss.shape == verdict.prediction.shape == batch[1].shape
    # Weights that were not trained hardly do better or worse than chance.
    chance = np.log(data.num_classes)
    assert 0.5 * chance < np.mean(verdict.loss) < 2 * chance
    assert np.all((verdict.prediction >= 0) & (verdict.prediction < data.num_classes))


def test_models_and_data_must_fit():
    sequences = load(DataOptions("copy_memory", train_size=4, test_size=4))
    for model in (SciMLConfig(), TanhConfig(), ResNetConfig(), MDEQ):
        with pytest.raises(DataError, match="takes images"):
            build(model, EquilibriumOptions(), sequences, key=jr.key(0))
    for model in (SMALL_TRANSFORMER, CausalTransformerConfig()):
        with pytest.raises(DataError, match="takes text and other sequences"):
            images = image_data(8, 3, 3, False)
            build(model, EquilibriumOptions(), images, key=jr.key(0))
    for model in (SciMLConfig(), TanhConfig(), ResNetConfig()):
        with pytest.raises(DataError, match="these have masks"):
            masks = image_data(8, 1, 3, True)
            build(model, EquilibriumOptions(), masks, key=jr.key(0))
    with pytest.raises(OptionError, match="--cutoffs must be .* size 3; got"):
        model = dataclasses.replace(SMALL_TRANSFORMER, cutoffs=(5,))
        build(model, EquilibriumOptions(), Data(TEXT, TEXT, 3), key=jr.key(0))
    with pytest.raises(DataError, match="multiples of 4; these have 6 x 6"):
        small = image_data(6, 3, 3, False)
        build(MDEQ, EquilibriumOptions(), small, key=jr.key(0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(solver):
    data, options = image_data(4, 1, 3, False), EquilibriumOptions(solver, start="cell")
    network, _ = build(TanhConfig(width=3), options, data, key=jr.key(0))
    assert isinstance(network.layer, inn.SkipDeepEquilibriumNetwork)
    solution = eqx.filter_eval_shape(network.layer.solve, jnp.ones(3))
    assert solution.z_star.shape == (3,)


def test_start_of_a_model_that_has_its_own():
    options = EquilibriumOptions(start="cell")
    with pytest.raises(OptionError, match="take --start model"):
        build(SMALL_TRANSFORMER, options, Data(TEXT, TEXT, 3), key=jr.key(0))


@pytest.mark.parametrize(
    "options, exact",
    [
        *(({"adjoint": adjoint}, False) for adjoint in ADJOINTS),
        *(({"adjoint_solver": name, "adjoint_rtol": 1e-6}, True) for name in LINEAR),
    ],
)
def test_adjoints(options, exact):
    """Each descends, where the weights are small and so the gradients much the same.
    The linear solvers all find the exact one."""
    data = image_data(4, 1, 3, False)
    options = EquilibriumOptions("broyden", rtol=1e-6, start="injection", **options)
    network, _ = build(TanhConfig(width=3), options, data, key=jr.key(0))

    def gradient(layer):
        return jax.jit(jax.grad(lambda x: jnp.sum(layer(x))))(jnp.ones(3))

    expected = gradient(inn.set_fixed_depth(network.layer, 20))
    found = gradient(network.layer)
    if exact:
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    cosine = jnp.dot(found, expected) / two_norm(found) / two_norm(expected)
    assert cosine > 0.7


def test_options_of_the_solver():
    options = EquilibriumOptions(history_size=2, ridge=1e-3, damping=0.25)
    solver = make_solver(options)
    assert (solver.history_size, solver.ridge, solver.damping) == (2, 1e-3, 0.25)
    assert make_solver(EquilibriumOptions("broyden", history_size=7)).history_size == 7
    assert make_solver(EquilibriumOptions()) == inn.AndersonAcceleration(1e-3, 1e-6)
    adjoint = ADJOINTS["phantom"](EquilibriumOptions(adjoint_damping=0.5))
    assert isinstance(adjoint, inn.PhantomAdjoint) and adjoint.damping == 0.5


def test_l2_in_the_loss():
    """The first step of plain gradient descent is shorter by the weights, scaled."""
    config = Config(
        TanhConfig(width=2),
        optimiser=OptimiserOptions("sgd", momentum=0.0, learning_rate=0.1),
        training=UNROLLED,
    )
    data = image_data(4, 1, 3, False)
    after = []
    for l2_weight in (0.0, 0.5):
        training = dataclasses.replace(UNROLLED, l2_weight=l2_weight)
        trainer = Trainer(dataclasses.replace(config, training=training), data)
        start = trainer.start()
        state, metrics = trainer.train_step(start, 0)
        after.append((weights(state.network), means([metrics])["loss"]))
    (plain, loss), (decayed, other_loss) = after
    difference = -0.1 * 0.5 * weights(start.network)
    np.testing.assert_allclose(decayed - plain, difference, atol=1e-6)
    assert loss == other_loss


def test_test_sequences_of_another_length(tmp_path):
    (tmp_path / "text").write_text(200 * "abc")
    options = DataOptions("text", tmp_path / "text", level="character", test_size=20)
    (tmp_path / "text").write_text("\n".join(40 * ["abcabc"]))
    longer = dataclasses.replace(options, sequence_length=4, test_sequence_length=6)
    data = load(longer)
    assert (data.train.length, data.test.length) == (4, 6)
    with pytest.raises(OptionError, match="--test-sequence-length must be at most"):
        build(CausalTransformerConfig(), QUICK, data, key=jr.key(0))
    build(SMALL_TRANSFORMER, QUICK, data, key=jr.key(0))


def test_options_that_do_not_go_together():
    data = image_data(4, 1, 3, False)
    for sentence, options in (
        ("shine goes with", EquilibriumOptions(adjoint="shine")),
        ("one number of", EquilibriumOptions(adjoint="unrolled", max_steps_delta=1)),
    ):
        with pytest.raises(OptionError, match=sentence):
            build(TanhConfig(width=3), options, data, key=jr.key(0))


def test_random_numbers_of_steps():
    options = EquilibriumOptions(max_steps=4, max_steps_delta=2)
    data = image_data(4, 1, 3, False)
    network, _ = build(TanhConfig(width=2), options, data, key=jr.key(0))
    networks = [
        with_random_budget(network, options, key=key) for key in jr.split(jr.key(1), 20)
    ]
    assert {int(network.layer.max_steps) for network in networks} == {2, 3, 4}
