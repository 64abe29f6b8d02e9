# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Classify handwritten digits
#
# A deep equilibrium network (DEQ) is a layer without a depth. Its output is the
# *equilibrium* $z^\star = f(z^\star, x)$ of one cell $f$, as if the cell had been
# applied infinitely often; a solver finds it, and the implicit function theorem
# differentiates it, so that training takes the memory of a single application.
#
# This tutorial builds a convolutional classifier around such a layer and trains it on
# real handwritten digits: the 1,797 images of 8 x 8 pixels that come with
# scikit-learn. The network and the schedule are those of [SciML's MNIST
# tutorial](https://docs.sciml.ai/DeepEquilibriumNetworks/stable/tutorials/basic_mnist_deq/),
# with the stem fitted to the size of the images. The page is a script:
#
# ```bash
# python docs/tutorials/mnist.py
# python docs/tutorials/mnist.py --model-type skipdeq --solver newton-krylov
# python docs/tutorials/mnist.py --help
# ```

# %%
import dataclasses
import gzip
import math
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import implicitnets as inn
from implicitnets import plot


# %% [markdown]
# ## The options
#
# Every solver is a constructor argument of the layer, so a table of them is all that
# it takes to choose one by name: ours, those of Optimistix, and ODE solvers of Diffrax,
# which follow $\dot z = f(z, x) - z$ to its steady state.

# %%
SolverName = Literal["anderson", "broyden", "fixed-point", "newton-krylov", "tsit5"]

SOLVERS: dict[SolverName, Callable[[float], Any]] = {
    "anderson": lambda rtol: inn.AndersonAcceleration(rtol, 1e-6),
    "broyden": lambda rtol: inn.Broyden(rtol, 1e-6),
    "fixed-point": lambda rtol: optx.FixedPointIteration(rtol, 1e-6),
    "newton-krylov": lambda rtol: inn.NewtonKrylov(rtol, 1e-6),
    "tsit5": lambda rtol: inn.SteadyState(dfx.Tsit5(), rtol, 1e-6),
}

ModelType = Literal["deq", "skipdeq", "skipregdeq"]
DatasetName = Literal["digits", "mnist", "fashion_mnist", "kmnist", "emnist"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a deep equilibrium network to classify images of digits."""

    dataset: DatasetName = "digits"
    """Images to learn; `digits` come with scikit-learn."""
    data_dir: Path | None = None
    """Folder of MNIST-format files, for the other data sets."""
    model_type: ModelType = "deq"
    """Where a solve starts: at zero, at a trained guess, at the cell's own guess."""
    solver: SolverName = "anderson"
    """What finds the equilibrium."""
    rtol: float = 1e-3
    """Relative tolerance of the solver."""
    pretraining_epochs: int = 2
    """Epochs with the cell unrolled to a fixed depth of 5."""
    epochs: int = 10
    """Epochs with the equilibrium, after the pretraining."""
    channels: int = 64
    """Channels of the cell."""
    batch_size: int = 32
    """Images in a step of the optimiser."""
    learning_rate: float = 5e-4
    """Of Adam."""
    train_size: int | None = None
    """Train on so many images only."""
    test_size: int | None = None
    """Test on so many images only."""
    seed: int = 0
    """Of the weights and of the order of the images."""
    output_dir: Path = Path("figures")
    """Folder that the figures are written to."""

    def __post_init__(self):
        for name in ("epochs", "pretraining_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative.")
        for name in ("channels", "batch_size", "train_size", "test_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be positive.")


# %% [markdown]
# ## The data
#
# Images become arrays of shape `(channels, height, width)` with values from 0 to 1. The
# digits are split once and for all, the same number of each in the test set. The larger
# data sets are read from a folder of files in MNIST's own format (such as Debian's
# package `dataset-fashion-mnist` installs), or fetched from OpenML by scikit-learn.


# %%
class DataError(Exception):
    """What keeps the data from being read, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and their labels."""

    images: Float[np.ndarray, "example channel height width"]
    labels: Int[np.ndarray, " example"]

    @classmethod
    def from_pixels(cls, pixels: np.ndarray, labels: np.ndarray, white: float):
        """From grey values between 0 and `white`."""
        images = (pixels[:, None] / white).astype(np.float32)
        return cls(images, labels.astype(np.int32))

    def __getitem__(self, rows: slice | np.ndarray) -> "Images":
        return Images(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def load(config: Config) -> tuple[Images, Images]:
    """The training set and the test set that the options ask for."""
    if config.dataset == "digits":
        train, test = load_sklearn_digits()
    elif config.data_dir is not None:
        train, test = load_folder(config.data_dir, config.dataset)
    else:
        train, test = fetch(config.dataset)
    return train[: config.train_size], test[: config.test_size]


def load_sklearn_digits() -> tuple[Images, Images]:
    pixels, labels = load_digits(return_X_y=True)
    digits = Images.from_pixels(pixels.reshape(-1, 8, 8), np.asarray(labels), white=16)
    train_rows, test_rows = train_test_split(
        np.arange(len(digits)), test_size=360, stratify=labels, random_state=0
    )
    return digits[np.asarray(train_rows)], digits[np.asarray(test_rows)]


def load_folder(folder: Path, dataset: DatasetName) -> tuple[Images, Images]:
    """Read the four files of a data set in MNIST's format, compressed or not."""
    prefix = "emnist-balanced-" if dataset == "emnist" else ""

    def read(split: str) -> Images:
        pixels = read_idx(find_idx(folder, f"{prefix}{split}-images?idx3-ubyte"), 3)
        labels = read_idx(find_idx(folder, f"{prefix}{split}-labels?idx1-ubyte"), 1)
        if len(pixels) != len(labels):
            raise DataError(
                f"{folder} has {len(pixels)} {split} images but {len(labels)} labels."
            )
        return Images.from_pixels(pixels, labels, white=255)

    return read("train"), read("test" if dataset == "emnist" else "t10k")


def find_idx(folder: Path, pattern: str) -> Path:
    paths = sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])
    if not paths:
        name = pattern.replace("?", "-")
        raise DataError(f"{folder} has no file {name} or {name}.gz.")
    return paths[0]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read bytes of `ndim` dimensions: a magic number, the shape, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    header = struct.Struct(f">I{ndim}I")
    unsigned_byte = 0x08
    if (
        len(content) < header.size
        or header.unpack_from(content)[0] != unsigned_byte << 8 | ndim
    ):
        raise DataError(f"{path} is not a file of bytes in MNIST's format.")
    shape = header.unpack_from(content)[1:]
    if len(content) != header.size + math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of data, "
            f"and there are {len(content) - header.size}."
        )
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def fetch(dataset: DatasetName) -> tuple[Images, Images]:
    """Fetch a data set from OpenML, or take it from scikit-learn's cache."""
    name = {
        "mnist": "mnist_784",
        "fashion_mnist": "Fashion-MNIST",
        "kmnist": "Kuzushiji-MNIST",
        "emnist": "EMNIST_Balanced",
    }[dataset]
    try:
        with warnings.catch_warnings(action="ignore"):  # of retries: the error says it
            pixels, labels = fetch_openml(
                name, version=1, as_frame=False, return_X_y=True, n_retries=1
            )
    except OSError as error:
        raise DataError(
            f"{dataset} could not be fetched ({error}); where there is no network, "
            "give a folder of its files in MNIST's format by --data-dir, or take "
            "--dataset digits."
        ) from error
    images = Images.from_pixels(pixels.reshape(-1, 28, 28), labels, white=255)
    # OpenML joins the two sets in their order; each test set is a seventh of the whole.
    split = len(images) * 6 // 7
    return images[:split], images[split:]


# %% [markdown]
# ## The model
#
# The cell adds a convolution of the state to one of the input, and convolves the sum
# again. Weights as small as these make it a contraction from the start, so the
# equilibrium exists, and is easy to find. A cell sees one example; batches come from
# `jax.vmap`, as for every Equinox layer.


# %%
def small_convolution(channels: int, key: PRNGKeyArray) -> eqx.nn.Conv2d:
    layer = eqx.nn.Conv2d(channels, channels, 3, padding=1, use_bias=False, key=key)
    weight = 0.01 * jr.truncated_normal(key, -2, 2, layer.weight.shape)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


class Cell(eqx.Module):
    state: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d
    mix: eqx.nn.Conv2d

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        self.state, self.inject, self.mix = (
            small_convolution(channels, k) for k in jr.split(key, 3)
        )

    def __call__(self, z: Array, x: Array) -> Array:
        return jnp.tanh(self.mix(jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))))


# %% [markdown]
# The layer is the cell, a solver, and a rule for where the solve starts. Plain DEQs
# start at zero. *Skip* DEQs ([Pal et al., 2022](https://arxiv.org/abs/2201.12240))
# start at the guess of an explicit network that is trained along, *Skip-regularised*
# ones at the cell's own first answer, which needs no more parameters.


# %%
def equilibrium_layer(
    config: Config, key: PRNGKeyArray
) -> inn.AbstractDeepEquilibriumNetwork:
    cell_key, init_key = jr.split(key)
    cell = Cell(config.channels, key=cell_key)
    solver = SOLVERS[config.solver](config.rtol)
    if config.model_type == "deq":
        return inn.DeepEquilibriumNetwork(cell, solver)
    if config.model_type == "skipregdeq":
        return inn.SkipDeepEquilibriumNetwork(cell, solver)
    channels = config.channels
    init = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(channels, channels, 3, padding=1, key=init_key),
            eqx.nn.Lambda(jax.nn.gelu),
        ]
    )
    return inn.SkipDeepEquilibriumNetwork(cell, solver, init=init)


class Classifier(eqx.Module):
    """A stem that makes features, the equilibrium of them, and a head that judges it.

    Images of 28 x 28 pixels become a state of 13 x 13, images of 8 x 8 one of 6 x 6.
    """

    stem: eqx.nn.Sequential
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Sequential

    def __init__(
        self, config: Config, image_size: int, classes: int, *, key: PRNGKeyArray
    ):
        stem_key, down_key, deq_key, head_key = jr.split(key, 4)
        channels = config.channels
        kernel_size, stride = (4, 2) if image_size > 16 else (3, 1)
        self.stem = eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(1, channels, 3, key=stem_key),
                eqx.nn.Lambda(jax.nn.gelu),
                eqx.nn.GroupNorm(channels, channels),
                eqx.nn.Conv2d(
                    channels, channels, kernel_size, stride, padding=1, key=down_key
                ),
            ]
        )
        self.deq = equilibrium_layer(config, deq_key)
        self.head = eqx.nn.Sequential(
            [
                eqx.nn.GroupNorm(channels, channels),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Lambda(lambda features: jnp.mean(features, axis=(1, 2))),
                eqx.nn.Linear(channels, classes, key=head_key),
            ]
        )

    def __call__(self, image: Array) -> tuple[Array, inn.EquilibriumSolution]:
        solution = self.deq.solve(self.stem(image))
        return self.head(solution.z_star), solution


# %% [markdown]
# ## The loss
#
# `solve` returns the whole story of a solve, so a loss can speak of any part of it:
# here of the distance from the start to the equilibrium, which draws the two together
# and saves the solver work. The number of steps and of cell evaluations goes to the
# progress bar and the table.

# %%
Metrics = dict[str, Array]


def evaluations(solution: inn.EquilibriumSolution) -> Array:
    # Other libraries' solvers do not tell; most of them evaluate the cell once a step.
    return solution.stats.get("nfe", solution.stats["num_steps"])


def loss_and_metrics(
    model: Classifier, images: Array, labels: Array
) -> tuple[Array, Metrics]:
    """The mean loss of a batch, and the metrics of each example."""

    def one_example(image: Array, label: Array) -> Metrics:
        logits, solution = model(image)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return {
            "loss": loss + 0.01 * inn.skip_penalty(solution),
            "accuracy": (jnp.argmax(logits) == label).astype(loss.dtype),
            "steps": solution.stats["num_steps"],
            "evaluations": evaluations(solution),
        }

    metrics = jax.vmap(one_example)(images, labels)
    return jnp.mean(metrics["loss"]), metrics


# %% [markdown]
# ## The training
#
# A deep equilibrium network learns faster if it starts as an ordinary deep one: for two
# epochs the cell is unrolled five times and differentiated through. Then
# `set_fixed_depth(model, 0)` makes the same model implicit, and the optimiser's state
# survives the switch. Each phase is compiled ahead of time, so that the table can tell
# compiling from running.


# %%
@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of the training, with the means over the test set at its end."""

    name: str
    epochs: int
    accuracy: float
    evaluations: float
    compile_seconds: float
    run_seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, its phases, and the mean metrics of every epoch."""

    model: Classifier
    phases: list[Phase]
    train_history: list[dict[str, float]]
    test_history: list[dict[str, float]]


def train(config: Config, train_set: Images, test_set: Images) -> Run:
    """Pretrain at fixed depth, then train the equilibrium."""
    rng = np.random.default_rng(config.seed)
    batch_size = min(config.batch_size, len(train_set))
    image_size = train_set.images.shape[-1]
    classes = int(max(train_set.labels.max(), test_set.labels.max())) + 1
    model = Classifier(config, image_size, classes, key=jr.key(config.seed))
    optimiser = optax.adam(config.learning_rate)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    run = Run(model, [], [], [])

    def update(model, opt_state, images, labels):
        loss = eqx.filter_grad(loss_and_metrics, has_aux=True)
        gradients, metrics = loss(model, images, labels)
        updates, opt_state = optimiser.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), opt_state, metrics

    for name, epochs, depth in (
        ("pretraining", config.pretraining_epochs, 5),
        ("implicit", config.epochs, 0),
    ):
        model = inn.set_fixed_depth(model, depth)
        if epochs == 0:
            continue

        start = time.perf_counter()
        example = next(batches(train_set, np.arange(batch_size), batch_size))
        compiled_update = compiled(update, model, opt_state, *example)
        compiled_loss = compiled(loss_and_metrics, model, *example)
        compile_seconds = time.perf_counter() - start

        start = time.perf_counter()
        progress = tqdm(
            total=epochs * (len(train_set) // batch_size),
            desc=f"{name:11}",
            unit="batch",
            disable=None,
        )
        for _ in range(epochs):
            history = []
            order = rng.permutation(len(train_set))
            for batch in batches(train_set, order, batch_size):
                model, opt_state, metrics = compiled_update(model, opt_state, *batch)
                history.append(metrics)
                now = means([metrics])
                progress.set_postfix(
                    loss=f"{now['loss']:.3f}",
                    accuracy=f"{now['accuracy']:.1%}",
                    steps=f"{now['steps']:.1f}",
                )
                progress.update()
            run.train_history.append(means(history))
            run.test_history.append(
                evaluate(compiled_loss, model, test_set, batch_size)
            )
        progress.close()
        run_seconds = time.perf_counter() - start

        last = run.test_history[-1]
        accuracy, evaluations = last["accuracy"], last["evaluations"]
        run.phases.append(
            Phase(name, epochs, accuracy, evaluations, compile_seconds, run_seconds)
        )
    return dataclasses.replace(run, model=model)


def compiled(function: Callable, *args: Any) -> Callable:
    # Typed as the function that it wraps, `filter_jit` hides that it can be lowered.
    jitted: Any = eqx.filter_jit(function)
    return jitted.lower(*args).compile()


def batches(
    data: Images, order: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Full batches; what is left over waits for another order."""
    for start in range(0, len(order) - size + 1, size):
        batch = data[order[start : start + size]]
        yield batch.images, batch.labels


def evaluate(
    compiled_loss: Callable, model: Classifier, data: Images, batch_size: int
) -> dict[str, float]:
    """The mean metrics over a whole data set."""
    # The last batch is filled up from the start: one shape, one compilation.
    padded = np.arange(math.ceil(len(data) / batch_size) * batch_size) % len(data)
    history = [
        compiled_loss(model, *batch)[1] for batch in batches(data, padded, batch_size)
    ]
    return means(history, len(data))


def means(history: list[Metrics], size: int | None = None) -> dict[str, float]:
    """The means over the first `size` examples of some batches."""
    return {
        key: float(np.mean(np.concatenate([m[key] for m in history])[:size]))
        for key in history[0]
    }


# %% [markdown]
# ## The figures
#
# One shows the training; the other the relative residual
# $\lVert f(z, x) - z \rVert / \lVert f(z, x) \rVert$ of a solve against the number
# of cell evaluations, next to the plain iteration $z \leftarrow f(z, x)$.


# %%
def plot_training(run: Run) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, key in zip(axes, ("loss", "accuracy", "evaluations")):
        for name, history in (("train", run.train_history), ("test", run.test_history)):
            epochs = range(1, len(history) + 1)
            axis.plot(epochs, [metrics[key] for metrics in history], label=name)
        for phase in run.phases[:-1]:
            axis.axvline(phase.epochs + 0.5, color="grey", linestyle="--")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="epoch", title="cell evaluations" if "eval" in key else key)
    axes[0].legend()
    return figure


def plot_convergence(run: Run, solvers: set[SolverName], images: np.ndarray) -> Figure:
    """The median of the images and the middle half of them, for each solver."""
    deq = run.model.deq

    def trace(solver: SolverName) -> inn.ResidualTrace:
        def one_example(image: Array) -> inn.ResidualTrace:
            x = run.model.stem(image)
            return inn.residual_trace(
                deq.cell, SOLVERS[solver](1e-6), deq.start(x), x, max_steps=40
            )

        return eqx.filter_jit(jax.vmap(one_example))(jnp.asarray(images))

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    plot.convergence({solver: trace(solver) for solver in sorted(solvers)}, axes=axes)
    return figure


# %% [markdown]
# ## The run
#
# A line of the table is a phase: the accuracy on the test set at its end, the number of
# cell evaluations that a test image takes, and the time.


# %%
def table(run: Run) -> str:
    lines = [
        "phase        epochs  accuracy  evaluations  compile (s)  run (s)",
        "-----------  ------  --------  -----------  -----------  -------",
    ]
    for phase in run.phases:
        lines.append(
            f"{phase.name:11}  {phase.epochs:6}  {phase.accuracy:8.1%}  "
            f"{phase.evaluations:11.1f}  {phase.compile_seconds:11.1f}  "
            f"{phase.run_seconds:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    # A notebook's kernel has a command line of its own.
    config = tyro.cli(Config, args=[] if "ipykernel" in sys.modules else None)
    try:
        train_set, test_set = load(config)
    except DataError as error:
        sys.exit(f"Error: {error}")
    run = train(config, train_set, test_set)
    print(table(run))

    config.output_dir.mkdir(parents=True, exist_ok=True)
    plot_training(run).savefig(config.output_dir / "training.png", dpi=150)
    figure = plot_convergence(run, {config.solver, "fixed-point"}, test_set.images[:32])
    figure.savefig(config.output_dir / "convergence.png", dpi=150)
    print(f"Wrote training.png and convergence.png to {config.output_dir}.")


if __name__ == "__main__":
    main()

# %% [markdown]
# The dashed line is where pretraining ends. From there on the evaluations are what the
# solver needs, averaged over the images, of which each stops as soon as its own
# equilibrium is found. They rise while the cell learns: as its weights grow, it
# contracts less. With `--learning-rate 1e-3` it is soon no contraction at all: the
# plain iteration then wanders off, and Anderson acceleration still finds the
# equilibrium. `--model-type skipdeq` shows what a learned start saves.
