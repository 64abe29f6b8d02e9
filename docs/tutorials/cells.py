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
# # Write your own cell
#
# A cell is any callable `cell(z, x)` that maps a state `z` to a state of the same
# structure, shapes and dtypes. This page writes a dense cell, one with a pytree as its
# state, a convolutional one with dropout and normalised weights, and one that couples
# examples. It also shows how to check a cell.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph

import implicitnets as inn
from implicitnets import plot


images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
labels = jnp.asarray(labels)


# %% [markdown]
# ## The contract
#
# A cell takes one example; `jax.vmap` makes batches. Make it an `eqx.Module` to train
# its parameters. The solve starts at zeros like `x`. If the state has another shape,
# `zero_state` makes the zeros.


# %%
class Cell(eqx.Module):
    hidden: eqx.nn.Linear
    inject: eqx.nn.Linear

    def __init__(self, in_size, size, *, key):
        hidden_key, inject_key = jr.split(key)
        self.hidden = eqx.nn.Linear(size, size, key=hidden_key)
        self.inject = eqx.nn.Linear(in_size, size, key=inject_key)

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + self.inject(x))


@eqx.filter_jit
def solve(deq, x):
    return deq.solve(x)


cell = Cell(64, 32, key=jr.key(0))
deq = inn.DeepEquilibriumNetwork(cell, zero_state=lambda x: jnp.zeros(32))
solution = solve(deq, images[0])
print(f"state: {solution.z_star.shape}")
print(f"successful: {bool(solution.result == optx.RESULTS.successful)}")
print(f"evaluations of the cell: {solution.stats['nfe']}")

# %% [markdown]
# A cell that returns anything else raises an error when it is traced:

# %%
try:
    solve(eqx.tree_at(lambda deq: deq.cell, deq, lambda z, x: z[1:]), images[0])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Pytrees
#
# The state and the input may be any pytree. Here the state is two layers of units that
# drive each other, and the input is an image with a gain. Pass everything that a cell
# needs in `x`: the equilibrium has a gradient with respect to each part.


# %%
class TwoLayers(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        low, high = z
        return (
            jnp.tanh(x["gain"] * (self.weight @ high + x["image"])),
            jnp.tanh(x["gain"] * (self.weight.T @ low)),
        )


two_layers = inn.DeepEquilibriumNetwork(
    TwoLayers(0.1 * jr.normal(jr.key(0), (64, 16))),
    inn.AndersonAcceleration(rtol=1e-6, atol=0.0),
    zero_state=lambda x: (jnp.zeros(64), jnp.zeros(16)),
)


def activity(gain):
    low, high = two_layers({"image": images[0], "gain": gain})
    return jnp.sum(low**2) + jnp.sum(high**2)


slope = jax.jit(jax.grad(activity))(0.5)
print(f"d(activity) / d(gain): {slope:.2f}")


# %% [markdown]
# ## Convolutions, dropout, normalised weights
#
# Write convolutions as usual: the layer rewrites them into the form that is fast in a
# loop on CPU.
#
# A cell with an argument `key` gets the key of the layer's call: the *same* key in
# every evaluation of the solve and of its gradient. `inn.nn.VariationalDropout` draws
# its mask from that key. The mask is then fixed, and an equilibrium exists.
#
# `inn.nn.weight_norm` replaces each weight by a *parametrisation*: its length and its
# direction, which are trained. The layer computes the weight once per solve, not in
# every evaluation. Other parametrisations bound the cell's slope: see
# [Keep it stable](../stability/). For one of your own, subclass
# `inn.nn.AbstractParametrisation`.


# %%
class ConvCell(eqx.Module):
    convolution: eqx.nn.Conv2d
    dropout: inn.nn.VariationalDropout

    def __init__(self, channels, *, key):
        self.convolution = eqx.nn.Conv2d(channels, channels, 3, padding=1, key=key)
        self.dropout = inn.nn.VariationalDropout(0.2, shared_axes=(1, 2))

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(self.dropout(self.convolution(z), key=key) + x)


class Classifier(eqx.Module):
    stem: eqx.nn.Conv2d
    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(self, *, channels=16, key):
        stem_key, cell_key, head_key = jr.split(key, 3)
        stem = eqx.nn.Conv2d(1, channels, 3, stride=2, padding=1, key=stem_key)
        head = eqx.nn.Linear(channels * 16, 10, key=head_key)
        self.stem, self.head = inn.nn.initialise((stem, head), key=head_key)
        cell = inn.nn.weight_norm(ConvCell(channels, key=cell_key))
        self.deq = inn.DeepEquilibriumNetwork(cell)

    def __call__(self, image, *, key=None):
        z = self.deq(self.stem(image.reshape(1, 8, 8)), key=key)
        return self.head(z.reshape(-1))


# %% [markdown]
# Training is the same as for any other model. Each example gets its own key.

# %%
optimiser = optax.adam(3e-3)


def cross_entropy(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@eqx.filter_jit
def train_step(model, state, loss_fn, *batch):
    gradient = eqx.filter_grad(loss_fn)(model, *batch)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state


def image_loss(model, x, y, key):
    logits = jax.vmap(lambda x, key: model(x, key=key))(x, jr.split(key, len(x)))
    return cross_entropy(logits, y)


model = Classifier(key=jr.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_array))
rng = np.random.default_rng(0)
for key in jr.split(jr.key(1), 100):
    rows = rng.integers(0, 1500, 32)
    batch = images[rows], labels[rows], key
    model, state = train_step(model, state, image_loss, *batch)

# %% [markdown]
# `eqx.nn.inference_mode` turns dropout off. With dropout on, a key fixes the mask, and
# so the equilibrium:

# %%
features = model.stem(images[0].reshape(1, 8, 8))
equilibrium = eqx.filter_jit(lambda model, key: model.deq(features, key=key))
z = equilibrium(model, jr.key(0))
for seed in (0, 1):
    same = jnp.array_equal(z, equilibrium(model, jr.key(seed)))
    print(f"key 0 and key {seed}: the same equilibrium: {bool(same)}")

# %% [markdown]
# ## Check it
#
# Check a new cell before and after training:
#
# * Was the equilibrium found? `solution.result` says so for every example, and
#   `solution.residual` is `cell(z_star, x) - z_star`.
# * How hard was it? `solution.stats["num_steps"]` says so, and `plot.solves` draws it.
# * How close is it to failing? `inn.spectral_radius` of the cell's Jacobian at the
#   equilibrium says so. Plain iteration converges if it is below one, in about
#   $\ln(1/\varepsilon) / \ln(1/\rho)$ steps for a relative error $\varepsilon$.


# %%
@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0))
def check(model, image):
    x = model.stem(image.reshape(1, 8, 8))
    solution = model.deq.solve(x)
    z = solution.z_star
    radius = inn.spectral_radius(model.deq.cell, z, x, key=jr.key(2))
    return solution, radius, jnp.argmax(model.head(z.reshape(-1)))


tested = eqx.nn.inference_mode(model)
solutions, radii, predicted = check(tested, images[1500:])
success = jnp.mean(solutions.result == optx.RESULTS.successful)
print(f"accuracy on the last 297 images: {jnp.mean(predicted == labels[1500:]):.1%}")
print(f"solved: {success:.1%}, spectral radius at most {jnp.max(radii):.2f}")

figure, (left, right) = plt.subplots(1, 2, layout="constrained", figsize=(8, 3.5))
plot.solves(solutions, axes=left)
plot.spectrum(inn.nn.resolve(tested.deq.cell), z, features, axes=right)
plt.show()

# %% [markdown]
# Outside a layer, as in the call of `plot.spectrum`, apply `inn.nn.resolve` to a cell
# with parametrised weights first. [Keep it stable](../stability/) says what to do about
# a radius close to one.
#
# ## Couple examples
#
# Under `jax.vmap` every example is solved on its own. If the equilibrium of one example
# depends on the others, the whole batch is one state: call the layer on the batch,
# without `vmap`.
#
# In an implicit graph neural network ([Gu et al.,
# 2020](https://arxiv.org/abs/2009.06211)) the next state of a node depends on the
# average of its neighbours. Here a graph joins each of 400 images to the eight images
# most like it. An average does not expand in the maximum norm. So a weight whose
# infinity-norm is below one makes this cell a contraction.


# %%
class GraphCell(eqx.Module):
    hidden: eqx.nn.Linear

    def __call__(self, z, x):
        average = x["graph"] @ z
        return jnp.tanh(jax.vmap(self.hidden)(average) + x["features"])


class GraphClassifier(eqx.Module):
    stem: eqx.nn.Linear
    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jr.split(key, 3)
        self.stem = eqx.nn.Linear(64, 64, key=keys[0])
        cell = GraphCell(eqx.nn.Linear(64, 64, key=keys[1]))
        self.deq = inn.DeepEquilibriumNetwork(
            inn.nn.infinity_norm(cell, bound=0.95),
            zero_state=lambda x: jnp.zeros_like(x["features"]),
        )
        self.head = eqx.nn.Linear(64, 10, key=keys[2])

    def __call__(self, images, graph):
        features = jax.vmap(self.stem)(images)
        return jax.vmap(self.head)(self.deq({"features": features, "graph": graph}))


# %% [markdown]
# Fifty images have a label. To see what the graph adds, the second graph joins every
# image to itself alone.

# %%
nodes = images[:400]
neighbours = jnp.asarray(kneighbors_graph(nodes, 8).toarray() / 8, nodes.dtype)


def graph_loss(model, graph):
    return cross_entropy(model(nodes, graph)[:50], labels[:50])


for name, graph in {"alone": jnp.eye(400), "with neighbours": neighbours}.items():
    model = GraphClassifier(key=jr.key(0))
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    for _ in range(40):
        model, state = train_step(model, state, graph_loss, graph)
    predicted = jnp.argmax(eqx.filter_jit(model)(nodes, graph), 1)
    accuracy = jnp.mean((predicted == labels[:400])[50:])
    print(f"{name:15}: accuracy {accuracy:.1%} on the images without a label")
