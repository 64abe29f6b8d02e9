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
# A cell is any callable `cell(z, x)` that maps a state `z` to one of the same
# structure, shapes and dtypes. That is the whole contract: the layer does the rest.
# This page goes from the smallest cell to a convolutional one with dropout and
# normalised weights, to one that couples examples, and says how to check them.

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
# A cell sees one example; batches come from `jax.vmap`. Make it an `eqx.Module` to
# train what is in it. The state starts as zeros like `x`; for a state of another shape
# say how it starts by `init`. `solve` returns the equilibrium and how it was found.


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
deq = inn.DeepEquilibriumNetwork(cell, init=lambda x: jnp.zeros(32))
solution = solve(deq, images[0])
print(f"state: {solution.z_star.shape}")
print(f"successful: {bool(solution.result == optx.RESULTS.successful)}")
print(f"evaluations of the cell: {solution.stats['nfe']}")

# %% [markdown]
# A cell that does not keep its promise is caught when it is traced, before anything
# is computed. This one returns more than the state:


# %%
def talkative(z, x):
    return {"state": cell(z, x), "input": x}


deq = inn.DeepEquilibriumNetwork(talkative, init=lambda x: jnp.zeros(32))
try:
    solve(deq, images[0])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Pytrees
#
# State and input may be any pytree. Here the state is two layers of units that answer
# to each other, and the input is an image with a gain. Every argument that a cell
# needs travels in `x`, and the equilibrium can be differentiated with respect to each.


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
    init=lambda x: (jnp.zeros(64), jnp.zeros(16)),
)


def activity(gain):
    low, high = two_layers({"image": images[0], "gain": gain})
    return jnp.sum(low**2) + jnp.sum(high**2)


value_and_slope = jax.jit(jax.value_and_grad(activity))
(low, _), (_, slope), (high, _) = (value_and_slope(gain) for gain in (0.49, 0.5, 0.51))
print(f"d(activity) / d(gain): {slope:.2f}")
print(f"by finite differences: {(high - low) / 0.02:.2f}")


# %% [markdown]
# ## Convolutions, dropout, normalised weights
#
# An `eqx.nn.Conv2d` is a part like any other. The library rewrites convolutions into
# the form that is fast in a loop on CPU, so write them as you always do.
#
# A cell with an argument `key` gets the key that the layer was called with: the *same*
# one in every evaluation of the solve and of its gradient. So a mask that is drawn from
# it is fixed, and there is an equilibrium to find. `inn.nn.VariationalDropout` is
# made for that, and can drop whole channels.


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
        self.stem = eqx.nn.Conv2d(1, channels, 3, stride=2, padding=1, key=stem_key)
        cell = inn.nn.weight_norm(ConvCell(channels, key=cell_key))
        self.deq = inn.DeepEquilibriumNetwork(cell)
        self.head = eqx.nn.Linear(channels * 16, 10, key=head_key)

    def __call__(self, image, *, key=None):
        z = self.deq(self.stem(image.reshape(1, 8, 8)), key=key)
        return self.head(z.reshape(-1))


# %% [markdown]
# `inn.nn.weight_norm` puts a *parametrisation* in the place of each weight: here its
# length and its direction, which are what is trained. The layer computes the weight
# from them once at the start of a solve, and not in every evaluation, also for a
# batch. Other parametrisations bound the cell's slope: see
# [Keep it stable](../stability/). A parametrisation of your own has fields, and a
# `value` that is computed from them.


# %%
class Symmetric(inn.nn.AbstractParametrisation):
    half: jax.Array

    def value(self):
        jax.debug.print("The weight is computed.")
        return self.half + self.half.T


half = eqx.nn.Linear(64, 64, key=jr.key(1)).weight / 2
symmetric = eqx.tree_at(
    lambda cell: cell.hidden.weight, Cell(64, 64, key=jr.key(0)), Symmetric(half)
)
batch_solve = eqx.filter_vmap(solve, in_axes=(None, 0))
solutions = batch_solve(inn.DeepEquilibriumNetwork(symmetric), images[:32])
jax.effects_barrier()
print(f"{jnp.sum(solutions.stats['nfe'])} evaluations for {len(images[:32])} images")

# %% [markdown]
# Training is as for any other model. Each example gets a key of its own.

# %%
optimiser = optax.adam(3e-3)


def cross_entropy(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@eqx.filter_jit
def train_step(model, state, x, y, key):
    def loss_fn(model):
        def one_example(x, key):
            return model(x, key=key)

        return cross_entropy(jax.vmap(one_example)(x, jr.split(key, len(x))), y)

    gradient = eqx.filter_grad(loss_fn)(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state


model = Classifier(key=jr.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_array))
rng = np.random.default_rng(0)
for key in jr.split(jr.key(1), 100):
    rows = rng.integers(0, 1500, 32)
    model, state = train_step(model, state, images[rows], labels[rows], key)

test_images, test_labels = images[1500:], labels[1500:]
evaluate = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
predicted = jnp.argmax(evaluate(eqx.nn.inference_mode(model), test_images), 1)
print(f"accuracy on the last 297 images: {jnp.mean(predicted == test_labels):.1%}")

# %% [markdown]
# `eqx.nn.inference_mode` turns dropout off. With it on, a key is one mask, and one mask
# is one equilibrium. The 16 channels of one image:

# %%
features = model.stem(images[0].reshape(1, 8, 8))
equilibrium = eqx.filter_jit(lambda model, key: model.deq(features, key=key))
columns = {
    "key 0": equilibrium(model, jr.key(0)),
    "key 0 again": equilibrium(model, jr.key(0)),
    "key 1": equilibrium(model, jr.key(1)),
    "inference": equilibrium(eqx.nn.inference_mode(model), jr.key(1)),
}
same = jnp.array_equal(columns["key 0"], columns["key 0 again"])
print(f"the same key gives the same equilibrium: {bool(same)}")

figure, axes = plt.subplots(1, 4, layout="constrained", figsize=(8, 2.4))
for axis, (name, z) in zip(axes, columns.items()):
    # A mosaic of the channels, four in a row.
    mosaic = z.reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
    axis.imshow(mosaic, vmin=-1, vmax=1, cmap="RdBu")
    axis.set(title=name, xticks=(), yticks=())
plt.show()

# %% [markdown]
# ## Check it
#
# Three questions to ask of a new cell, before and after training.
#
# * Was the equilibrium found? `solution.result` says so for every example, and
#   `solution.residual` is `cell(z_star, x) - z_star`.
# * How hard was it? `solution.stats["num_steps"]`, which `plot.solves` draws.
# * How close to not being found is it? `inn.spectral_radius` of the cell's Jacobian at
#   the equilibrium: plain iteration converges below one, in about
#   $\ln(1/\varepsilon) / \ln(1/\rho)$ steps for a relative error $\varepsilon$.


# %%
@eqx.filter_jit
def check(model, images):
    def one_example(image, key):
        x = model.stem(image.reshape(1, 8, 8))
        solution = model.deq.solve(x)
        radius = inn.spectral_radius(model.deq.cell, solution.z_star, x, key=key)
        return solution, radius

    return jax.vmap(one_example)(images, jr.split(jr.key(2), len(images)))


solutions, trained_radii = check(eqx.nn.inference_mode(model), test_images)
_, first_radii = check(eqx.nn.inference_mode(Classifier(key=jr.key(0))), test_images)
success = jnp.sum(solutions.result == optx.RESULTS.successful)
largest = jnp.max(jnp.linalg.norm(solutions.residual.reshape(297, -1), axis=1))
print(f"solved: {success} of 297, with residuals up to {largest:.0e}")
print(f"spectral radius: {jnp.max(first_radii):.2f} at most before training,")
print(f"                 {jnp.max(trained_radii):.2f} at most after it")

# %%
figure, (left, right) = plt.subplots(1, 2, layout="constrained", figsize=(8, 3.5))
plot.solves(solutions, axes=left)
cell = eqx.nn.inference_mode(model).deq.cell
plot.spectrum(inn.nn.resolve(cell), columns["inference"], features, axes=right)
plt.show()

# %% [markdown]
# Outside a layer, as in the last line but one, call `inn.nn.resolve` on a cell with
# parametrised weights before you use it. What to do about a radius that comes too close
# to one is the subject of [Keep it stable](../stability/).
#
# ## A cell that couples examples
#
# Under `jax.vmap` every example is solved on its own. Where the equilibrium of one
# depends on the others, the whole batch is one state: call the layer on it without
# `vmap`.
#
# A graph joins each of 400 images to the eight that are most like it. The state has a
# row for every image, and a row's next value depends on the average of its neighbours:
# an implicit graph neural network
# ([Gu et al., 2020](https://arxiv.org/abs/2009.06211)). Averages do not expand in the
# maximum norm. So, with the infinity-norm of the weight kept below one, this cell is a
# contraction, whatever is trained.


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
        stem_key, cell_key, head_key = jr.split(key, 3)
        self.stem = eqx.nn.Linear(64, 64, key=stem_key)
        cell = GraphCell(eqx.nn.Linear(64, 64, key=cell_key))
        self.deq = inn.DeepEquilibriumNetwork(
            inn.nn.infinity_norm(cell, bound=0.95),
            init=lambda x: jnp.zeros_like(x["features"]),
        )
        self.head = eqx.nn.Linear(64, 10, key=head_key)

    def solve(self, images, graph):
        features = jax.vmap(self.stem)(images)
        solution = self.deq.solve({"features": features, "graph": graph})
        return jax.vmap(self.head)(solution.z_star), solution


# %% [markdown]
# Fifty images have a label. What the graph adds is measured against a graph in which
# every image is its own only neighbour.

# %%
nodes, node_labels = images[:400], labels[:400]
graphs = {
    "alone": jnp.eye(400),
    "with neighbours": jnp.asarray(
        kneighbors_graph(nodes, 8).toarray() / 8, nodes.dtype
    ),
}


@eqx.filter_jit
def graph_step(model, state, graph):
    def loss_fn(model):
        logits, _ = model.solve(nodes, graph)
        return cross_entropy(logits[:50], node_labels[:50])

    gradient = eqx.filter_grad(loss_fn)(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state


for name, graph in graphs.items():
    model = GraphClassifier(key=jr.key(0))
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    for _ in range(40):
        model, state = graph_step(model, state, graph)
    logits, solution = eqx.filter_jit(model.solve)(nodes, graph)
    correct = jnp.argmax(logits, 1)[50:] == node_labels[50:]
    print(
        f"{name:15}: accuracy {jnp.mean(correct):.1%} on the images without a label, "
        f"{solution.stats['nfe']} evaluations, "
        f"successful: {bool(solution.result == optx.RESULTS.successful)}"
    )

# %% [markdown]
# One solve, one result and one number of evaluations for all the images together.
