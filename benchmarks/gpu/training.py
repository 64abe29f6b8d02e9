"""Training on data that stay on the device: a phase of some epochs is one program."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array

import implicitnets as inn

from ..training.equilibrium import EquilibriumOptions, make_layer
from ..training.fit import descend
from ..training.sciml import ModelType, SciMLClassifier, SciMLConfig
from .networks import (
    image_classifier,
    in_bfloat16,
    language_model,
    tightly_solved,
    with_layer,
)
from .record import Record, Row
from .solves import PRECISE, precision_name
from .timing import checked, compile_all, Job, said


# What no loss counts.
IGNORED = -1
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")
BFLOAT16 = "bfloat16 cell, float32 state"


@dataclasses.dataclass(frozen=True)
class Samples:
    """A training and a test set as arrays, of inputs and targets each."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    num_classes: int

    @property
    def targets_each(self) -> int:
        """How many targets an example has."""
        return int(np.prod(self.train[1].shape[1:]))


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training: the depth that the cell is unrolled to, 0 to solve."""

    name: str
    depth: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train, how, and on what.

    `model` has its equilibrium layer set up. `skip_weight` is that of the penalty on
    the distance from the start to the equilibrium. `exact_tests` are in float32, of
    equilibria that are solved tightly.
    """

    name: str
    model: Any
    samples: Samples
    batch_size: int
    learning_rate: float
    phases: tuple[Phase, ...]
    cosine: bool = True
    skip_weight: float = 0.0
    exact_tests: bool = False
    precision: str | None = None
    precision_name: str = ""

    @property
    def steps_per_epoch(self) -> int:
        """Of which the last is filled up with examples that do not count."""
        return -(-len(self.samples.train[1]) // self.batch_size)

    def optimiser(self) -> optax.GradientTransformation:
        """Adam with its schedule over all of the phases."""
        total = self.steps_per_epoch * sum(phase.epochs for phase in self.phases)
        rate = self.learning_rate
        schedule = optax.cosine_decay_schedule(rate, total) if self.cosine else rate
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def judge(model: Any, inputs: Array, targets: Array) -> tuple[Array, dict[str, Array]]:
    """Losses of a batch and what else there is to tell, where there are targets."""

    def one(inputs):
        injection, state = model.inject(inputs, eqx.nn.State({}))
        solution = model.deq.solve(injection)
        logits, _ = model.read_out(solution.z_star, state)
        return logits, solution

    logits, solution = jax.vmap(one)(inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(targets, 0)
    )
    counts = targets != IGNORED
    examples = jnp.any(counts.reshape(len(counts), -1), axis=1)
    nfe = solution.stats.get("nfe", solution.stats["num_steps"])
    found = {
        "loss": jnp.sum(jnp.where(counts, losses, 0)),
        "right": jnp.sum((jnp.argmax(logits, axis=-1) == targets) & counts),
        "targets": jnp.sum(counts),
        "evaluations": jnp.sum(jnp.where(examples, nfe, 0)),
        "converged": jnp.sum((solution.result == optx.RESULTS.successful) & examples),
        "examples": jnp.sum(examples),
        "skip": jnp.sum(jnp.where(examples, jax.vmap(inn.skip_penalty)(solution), 0)),
    }
    number = jnp.maximum(found["targets"], 1).astype(losses.dtype)
    return found["loss"] / number, found


def epoch_program(task: Task, depth: int) -> Callable:
    """`(arrays, optimiser state, data, rows) -> (arrays, optimiser state, metrics)`."""
    static = eqx.filter(task.model, eqx.is_array, inverse=True)
    optimiser = task.optimiser()

    def loss_fn(model, inputs, targets):
        loss, found = judge(inn.set_fixed_depth(model, depth), inputs, targets)
        number = jnp.maximum(found["examples"], 1).astype(loss.dtype)
        return loss + task.skip_weight * found["skip"] / number, found

    def epoch(arrays, state, data, rows):
        def step(carry, rows):
            arrays, state = carry
            inputs, targets = take(data, rows)
            gradient_fn = eqx.filter_grad(loss_fn, has_aux=True)
            model, state, found = descend(
                gradient_fn,
                optimiser,
                eqx.combine(arrays, static),
                state,
                inputs,
                targets,
            )
            return (eqx.filter(model, eqx.is_array), state), found

        (arrays, state), found = lax.scan(step, (arrays, state), rows)
        return arrays, state, jax.tree.map(jnp.sum, found)

    return epoch


def test_program(task: Task, depth: int) -> Callable:
    """`(arrays, data, rows) -> metrics`."""
    static = eqx.filter(task.model, eqx.is_array, inverse=True)

    def test(arrays, data, rows):
        model = eqx.combine(arrays, static)
        model = tightly_solved(model) if task.exact_tests else model
        model = inn.set_fixed_depth(model, depth)
        _, found = lax.map(lambda rows: judge(model, *take(data, rows)), rows)
        return jax.tree.map(jnp.sum, found)

    return test


def take(data: tuple[Array, Array], rows: Array) -> tuple[Array, Array]:
    """A batch of a data set; images are bytes until here."""
    inputs, targets = (leaf[jnp.maximum(rows, 0)] for leaf in data)
    if inputs.dtype == jnp.uint8:
        inputs = inputs.astype(jnp.float32) / 255
    missing = (rows < 0).reshape(-1, *(1,) * (targets.ndim - 1))
    return inputs, jnp.where(missing, IGNORED, targets)


def batches(
    size: int, batch_size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """The rows of every batch of an epoch, the last one filled up with `-1`."""
    order = np.arange(size) if rng is None else rng.permutation(size)
    rows = np.full(-(-size // batch_size) * batch_size, -1, np.int32)
    rows[:size] = order
    return rows.reshape(-1, batch_size)


def compile_task(task: Task) -> dict[Any, Job]:
    """The programs of a task's phases."""
    arrays = eqx.filter(task.model, eqx.is_array)
    state = task.optimiser().init(eqx.filter(task.model, eqx.is_inexact_array))
    train, test = jax.tree.map(jnp.asarray, (task.samples.train, task.samples.test))
    rows = batches(len(train[1]), task.batch_size)
    test_rows = batches(len(test[1]), task.batch_size)
    jobs: dict[Any, Job] = {}
    for depth in dict.fromkeys(phase.depth for phase in task.phases):
        epoch, judged = epoch_program(task, depth), test_program(task, depth)
        jobs["epoch", depth] = Job(epoch, (arrays, state, train, rows), task.precision)
        precision = PRECISE if task.exact_tests else task.precision
        jobs["test", depth] = Job(judged, (arrays, test, test_rows), precision)
    return jobs


def run_task(
    task: Task, programs: dict[Any, Any], check_time: Callable[[], None]
) -> Iterator[Row]:
    """Train, and yield a row for every phase."""
    programs = {key: checked(program) for key, program in programs.items()}
    rng = np.random.default_rng(0)
    first = programs["epoch", task.phases[0].depth]
    arrays, state, train, _ = first.arguments
    for phase in task.phases:
        epoch, test = programs["epoch", phase.depth], programs["test", phase.depth]
        times, found = [], {}
        if phase.epochs < 3:
            # A program's first run loads it, which a median of more would not show.
            jax.block_until_ready(epoch.compiled(arrays, state, *epoch.arguments[2:]))
        for _ in range(phase.epochs):
            check_time()
            rows = jnp.asarray(batches(len(train[1]), task.batch_size, rng))
            start = time.perf_counter()
            arrays, state, found = jax.block_until_ready(
                epoch.compiled(arrays, state, train, rows)
            )
            times.append(time.perf_counter() - start)
        seconds = float(np.median(times))
        tested = test.compiled(arrays, *test.arguments[1:])
        yield {
            "task": task.name,
            "precision": task.precision_name,
            "phase": phase.name,
            "epochs": phase.epochs,
            "batch": task.batch_size,
            "epoch (s)": seconds,
            **rates(task, seconds),
            **quality(task, tested),
            "evaluations in training": mean(found, "evaluations", "examples"),
            "compile (s)": epoch.compile_seconds,
            "temporary (MB)": epoch.temporary_mb,
        }


def rates(task: Task, seconds: float) -> Row:
    """How many examples, or characters, a second."""
    number = len(task.samples.train[1]) * task.samples.targets_each
    unit = "images" if task.samples.targets_each == 1 else "characters"
    return {f"{unit} / s": number / seconds}


def quality(task: Task, found: dict[str, Array]) -> Row:
    """How good the model is on the test set, and how its solves went there."""
    row: Row = {}
    if task.samples.targets_each == 1:
        row["accuracy (%)"] = 100 * mean(found, "right", "targets")
    else:
        row["bits per character"] = mean(found, "loss", "targets") / np.log(2)
    row["evaluations"] = mean(found, "evaluations", "examples")
    row["converged (%)"] = 100 * mean(found, "converged", "examples")
    return row


def mean(found: dict[str, Array], what: str, number: str) -> float:
    """A sum over a count."""
    return float(found[what]) / float(found[number])


def train_all(record: Record, tasks: Sequence[Task], table: str) -> None:
    """Compile all tasks side by side, train one after the other, and add their rows."""
    jobs = {
        (i, *key): job
        for i, task in enumerate(tasks)
        for key, job in compile_task(task).items()
    }
    found = compile_all(jobs)
    for i, task in enumerate(tasks):
        record.check_time()
        programs = {key[1:]: value for key, value in found.items() if key[0] == i}
        try:
            for row in run_task(task, programs, record.check_time):
                record.add(table, row)
        except (RuntimeError, ValueError, TypeError) as error:
            row = {"task": task.name, "precision": task.precision_name}
            record.add(table, {**row, "result": said(error)})


def in_precisions(task: Task) -> list[Task]:
    """A task in every precision."""
    bfloat16 = dataclasses.replace(
        task, model=in_bfloat16(task.model), precision_name=BFLOAT16
    )
    return [
        dataclasses.replace(task, precision_name=precision_name(None)),
        dataclasses.replace(
            task, precision=PRECISE, precision_name=precision_name(PRECISE)
        ),
        bfloat16,
    ]


# The tolerance is one that bfloat16 can reach.
LOOSE = EquilibriumOptions(
    rtol=1e-2, atol=0.0, max_steps=30, adjoint_rtol=1e-2, adjoint_max_steps=20
)


def fashion(folder: pathlib.Path | None, small: bool) -> Samples:
    """All of Fashion-MNIST; random images in a rehearsal without it."""
    if small:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
        labels = rng.integers(0, 10, 40).astype(np.int32)
        return Samples(
            "random images", (images[:24], labels[:24]), (images[24:], labels[24:]), 10
        )
    # It needs scikit-learn, which a rehearsal need not have.
    from ..training.data import DataOptions, load

    data: Any = load(DataOptions("fashion_mnist", data_dir=folder or FASHION))
    pairs = [(part.inputs, part.targets) for part in (data.train, data.test)]
    return Samples("Fashion-MNIST", pairs[0], pairs[1], 10)


def train_images(
    record: Record, small: bool, folder: pathlib.Path | None = None
) -> None:
    """The tutorial's network: an epoch at fixed depth, then the equilibrium."""
    samples = fashion(folder, small)
    model = image_classifier(samples.train[0].shape[1:], seed=0)
    task = Task(
        f"tutorial's network, {samples.name}",
        with_layer(model, make_layer(model.deq, LOOSE)),
        samples,
        batch_size=10 if small else 128,
        learning_rate=2e-3,
        phases=(
            Phase("fixed depth 5", 5, 1),
            Phase("equilibrium", 0, 1 if small else 3),
        ),
        skip_weight=0.01,
    )
    tasks = in_precisions(task)
    train_all(record, tasks[-1:] if small else tasks, "images")


def text(path: pathlib.Path | None, length: int, size: int | None) -> Samples:
    """Segments of a text, with the characters that follow; `size` of either set."""
    content = (path.read_text() if path else "the cell finds its rest. " * 40)[: 2**22]
    letters = sorted(set(content))
    codes = np.zeros(1 + max(map(ord, letters)), np.int32)
    codes[[ord(letter) for letter in letters]] = np.arange(len(letters))
    tokens = codes[np.frombuffer(content.encode("utf-32-le"), np.uint32)]
    number = (len(tokens) - 1) // length
    inputs, targets = (
        tokens[shift : shift + number * length].reshape(number, length)
        for shift in (0, 1)
    )
    split = number - max(1, number // 10)

    def part(rows):
        return inputs[rows][:size], targets[rows][:size]

    name = "text" if path else "a generated text"
    return Samples(name, part(slice(split)), part(slice(split, None)), len(letters))


def train_text(record: Record, small: bool, path: pathlib.Path | None = None) -> None:
    """A transformer on characters: some steps at fixed depth, then the equilibrium."""
    length, width, batch = (8, 16, 4) if small else (256, 512, 32)
    samples = text(path, length, 8 if small else 100 * batch)
    model = language_model(samples.num_classes, length, width, seed=0)
    task = Task(
        f"transformer, {samples.name}",
        with_layer(model, make_layer(model.deq, LOOSE)),
        samples,
        batch_size=batch,
        learning_rate=5e-4,
        phases=(Phase("fixed depth 5", 5, 1), Phase("equilibrium", 0, 1)),
        # A loose solve lets a position see a little of what it has to predict.
        exact_tests=True,
    )
    tasks = in_precisions(task)
    train_all(record, tasks[1:2] if small else tasks, "text")


def train_sciml(record: Record, small: bool, path: pathlib.Path | None = None) -> None:
    """The protocol of SciML's tutorial, with some of its models and solvers."""
    if path is None:
        samples = fashion(None, small=True)
        if not small:
            record.add("sciml", {"result": "not run: there is no --mnist"})
            return
    else:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
        images = images.reshape(-1, 1, 28, 28).astype(np.uint8)
        # The file is sorted by the labels.
        rows = np.random.default_rng(0).permutation(len(images))
        train, test = (
            rows[: 40 if small else 2000],
            rows[2000 : 2010 if small else 2500],
        )
        pairs = [
            (images[part], labels[part].astype(np.int32)) for part in (train, test)
        ]
        samples = Samples("MNIST", pairs[0], pairs[1], 10)
    chosen: tuple[tuple[ModelType, Any], ...] = (
        ("skipregdeq", "newton-krylov"),
        ("deq", "adams"),
        ("deq", "anderson"),
    )
    tasks = []
    for kind, solver in chosen:
        config = SciMLConfig(
            samples.train[0].shape[1:], kind, channels=8 if small else 64
        )
        model = SciMLClassifier(config, key=jr.key(0))
        options = EquilibriumOptions(solver, max_steps=10, adjoint_max_steps=10)
        tasks.append(
            Task(
                f"{kind}, {solver}, {samples.name}",
                with_layer(model, make_layer(model.deq, options)),
                samples,
                batch_size=8 if small else 32,
                learning_rate=5e-4,
                phases=(Phase("fixed depth 5", 5, 2), Phase("equilibrium", 0, 3)),
                cosine=False,
                skip_weight=0.01,
                precision_name=precision_name(None),
            )
        )
    train_all(record, tasks[:1] if small else tasks, "sciml")
