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
# # Several scales
#
# A *multiscale* equilibrium network has a fine state, for where things are, and coarser
# states, for what they are. It solves for all of them at once ([Bai et al.,
# 2020](https://arxiv.org/abs/2006.08656)). Every scale sees the others in each
# evaluation of the cell, and at the equilibrium they agree. This page builds such a
# layer for scikit-learn's digits.

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
from sklearn.linear_model import LogisticRegression

import implicitnets as inn


pixels, labels = load_digits(return_X_y=True)
images = jnp.asarray(pixels / 16, jnp.float32).reshape(-1, 1, 8, 8)
labels = jnp.asarray(labels)
train_size = 1437

# %% [markdown]
# ## The layer
#
# There are three scales, 8 x 8, 4 x 4 and 2 x 2, with more channels where there are
# fewer pixels. `inn.MultiScaleDeepEquilibriumNetwork` makes its cell from three kinds
# of layers:
#
# * a *main layer* for every scale takes the scale's own state. The main layer of the
#   finest scale also takes the input;
# * *mapping layers* form a square matrix. The layer in row $i$ and column $j$ brings
#   scale $i$ to the shape of scale $j$, and every scale becomes the sum of its column;
# * a *post-fuse layer* for every scale takes that sum.

# %%
channels = (8, 16, 32)
sizes = (8, 4, 2)


class Inject(eqx.Module):
    """The main layer of the finest scale."""

    hidden: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d

    def __init__(self, key):
        keys = jr.split(key)
        self.hidden = eqx.nn.Conv2d(channels[0], channels[0], 3, padding=1, key=keys[0])
        self.inject = eqx.nn.Conv2d(1, channels[0], 3, padding=1, key=keys[1])

    def __call__(self, z, x):
        return self.hidden(z) + self.inject(x)


def mapping_layer(source, target, key):
    """From one scale to another: strided convolutions down, repeated pixels up."""
    ratio = 2 ** abs(source - target)
    sizes = channels[source], channels[target]
    if source == target:
        return eqx.nn.Identity()
    if source < target:
        return eqx.nn.Conv2d(*sizes, ratio, stride=ratio, key=key)

    def repeat(z):
        return jnp.repeat(jnp.repeat(z, ratio, axis=1), ratio, axis=2)

    layers = [eqx.nn.Conv2d(*sizes, 1, key=key), eqx.nn.Lambda(repeat)]
    return eqx.nn.Sequential(layers)


def make_layer(key):
    keys = jr.split(key, (4, 3))
    others = [
        eqx.nn.Conv2d(width, width, 3, padding=1, key=key)
        for width, key in zip(channels[1:], keys[3, 1:])
    ]
    return inn.MultiScaleDeepEquilibriumNetwork(
        main_layers=[Inject(keys[3, 0]), *others],
        mapping_layers=[
            [mapping_layer(i, j, keys[i, j]) for j in range(3)] for i in range(3)
        ],
        post_fuse_layers=[eqx.nn.Lambda(jnp.tanh)] * 3,
        solver=inn.AndersonAcceleration(rtol=1e-2, atol=0.0),
        state_shapes=[(width, n, n) for width, n in zip(channels, sizes)],
        adjoint=inn.PhantomAdjoint(5),
        max_steps=50,
    )


# %% [markdown]
# The result is an `inn.DeepEquilibriumNetwork` of an `inn.MultiScaleCell`, whose
# `zero_state` makes zeros of the `state_shapes`. The state is a tuple of arrays, and so
# are the start, the residual and the equilibrium. Any solver and any adjoint works on
# it.

# %%
deq = make_layer(jr.key(0))
solution = eqx.filter_jit(lambda deq, x: deq.solve(x))(deq, images[0])
for z, residual in zip(solution.z_star, solution.residual):
    print(f"state {z.shape!s:10}  residual {optx.two_norm(residual):.1e}")
print(f"evaluations: {solution.stats['nfe']}")

# %% [markdown]
# ## Train it
#
# Every scale has a linear layer, and the logits are their sum. The phantom gradient
# above is a cheap one: see [Choose a gradient](../gradients/).


# %%
class Classifier(eqx.Module):
    deq: inn.DeepEquilibriumNetwork
    heads: list[eqx.nn.Linear]

    def __init__(self, key):
        deq_key, *keys = jr.split(key, 4)
        self.deq = make_layer(deq_key)
        self.heads = [
            eqx.nn.Linear(width * n * n, 10, key=key)
            for width, n, key in zip(channels, sizes, keys)
        ]

    def __call__(self, image):
        solution = self.deq.solve(image)
        logits = [head(z.reshape(-1)) for head, z in zip(self.heads, solution.z_star)]
        return sum(logits), solution


def loss_fn(model, x, y):
    logits, solution = jax.vmap(model)(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(loss), jnp.mean(solution.stats["nfe"])


@eqx.filter_jit
def train_step(model, state, x, y):
    loss = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (value, evaluations), gradient = loss(model, x, y)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, value, evaluations


optimiser = optax.adam(2e-3)
model = Classifier(jr.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_array))
rng = np.random.default_rng(0)
history = []
for step in range(100):
    rows = rng.integers(0, train_size, 32)
    model, state, *metrics = train_step(model, state, images[rows], labels[rows])
    history.append(metrics)

run = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
# All the images at once, to compile once.
logits, everywhere = run(model, images)
_, solution = jax.tree.map(lambda a: a[train_size:], (logits, everywhere))
correct = (jnp.argmax(logits, 1) == labels)[train_size:]
print(f"accuracy on the last {len(correct)} images: {jnp.mean(correct):.1%}")
print(f"evaluations an image: {jnp.mean(solution.stats['nfe']):.1f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, values, name in zip(axes, np.transpose(history), ("loss", "evaluations")):
    axis.plot(values)
    axis.set(xlabel="step", title=name)
plt.show()

# %% [markdown]
# ## What each scale shows
#
# Each row shows one scale: the norm of its state over the channels.

# %%
figure, axes = plt.subplots(4, 8, figsize=(9, 4.8), layout="constrained")
for column in range(8):
    axes[0, column].imshow(images[train_size + column, 0], cmap="gray_r")
    for row, z in enumerate(solution.z_star, start=1):
        axes[row, column].imshow(jnp.linalg.norm(z[column], axis=0))
for row, name in enumerate(("image", *(f"{n} x {n}" for n in sizes))):
    axes[row, 0].set_ylabel(name)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The derivative of the equilibrium with respect to the pixel in one corner shows how
# far that pixel reaches. It is computed in forward mode with the exact adjoint. One
# evaluation of the cell carries information by about a pixel of each scale, which is
# far at 2 x 2: through the coarse scales the corner reaches everything.

# %%
corner = jnp.zeros((1, 8, 8)).at[0, 0, 0].set(1.0)
exact = eqx.tree_at(lambda deq: deq.adjoint, model.deq, inn.ImplicitAdjoint())
respond = eqx.filter_jit(lambda deq, x, dx: jax.jvp(deq, (x,), (dx,))[1])
change = respond(exact, images[train_size], corner)
figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained")
for axis, z, n in zip(axes, change, sizes):
    norms = jnp.linalg.norm(z, axis=0)
    axis.imshow(jnp.log10(norms / jnp.max(norms)), vmin=-3, vmax=0)
    axis.set(title=f"{n} x {n}", xticks=[], yticks=[])
figure.colorbar(axes[0].images[0], ax=axes, label="log10 of the relative change")
plt.show()

# %% [markdown]
# How much does each scale know? Fit a classifier to the state of that scale alone,
# averaged over its pixels: as many numbers as the scale has channels.

# %%
for z, n in zip(everywhere.z_star, sizes):
    pooled = jnp.mean(z, axis=(2, 3))
    probe = LogisticRegression(max_iter=2000)
    probe.fit(pooled[:train_size], labels[:train_size])
    score = probe.score(pooled[train_size:], labels[train_size:])
    print(f"{n} x {n}, {pooled.shape[1]:2} numbers: accuracy {score:.1%}")

# %% [markdown]
# ## The published networks
#
# `inn.models.MDEQ` is the network of the paper: residual blocks as main layers, group
# and weight normalisation, dropout with one mask per solve, and a head from the finest
# scale to the coarsest. `inn.models.MDEQConfig` has its sizes, from CIFAR-10 to
# Cityscapes, and `inn.models.MDEQSegmenter` classifies every pixel. Their cell is an
# `inn.MultiScaleCell`, like the cell of this page.

# %%
print(inn.models.MDEQConfig.imagenet_small())
