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
# # Skip and pretraining
#
# What a solve costs depends on where it starts. This page trains one classifier of
# scikit-learn's digits with three kinds of start
# ([Pal et al., 2022](https://arxiv.org/abs/2201.12240)), pretrains it by unrolling, and
# then starts solves from the equilibria of the last ones.

# %%
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import implicitnets as inn


pixels, labels = load_digits(return_X_y=True)
pixels = jnp.asarray(pixels / 16, jnp.float32)
labels = jnp.asarray(labels)
test_pixels, test_labels = pixels[1500:], labels[1500:]


# %% [markdown]
# ## Three starts
#
# * plain: at zero;
# * *Skip*: at `init(x)`, an explicit network that is trained along;
# * *Skip-regularised*: at `cell(0, x)`, the cell's own first answer, which takes no
#   more parameters.


# %%
class Cell(eqx.Module):
    hidden: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + x)


class Classifier(eqx.Module):
    stem: eqx.nn.Linear
    deq: inn.AbstractDeepEquilibriumNetwork
    head: eqx.nn.Linear

    def solve(self, x):
        solution = self.deq.solve(self.stem(x))
        return self.head(solution.z_star), solution


def make_model(kind, size=64):
    stem_key, cell_key, init_key, head_key = jr.split(jr.key(0), 4)
    cell = Cell(eqx.nn.Linear(size, size, key=cell_key))
    solver = inn.AndersonAcceleration(rtol=1e-4, atol=0.0)
    if kind == "plain":
        deq = inn.DeepEquilibriumNetwork(cell, solver)
    elif kind == "Skip":
        init = eqx.nn.MLP(size, size, size, depth=1, key=init_key)
        deq = inn.SkipDeepEquilibriumNetwork(cell, solver, init=init)
    else:
        deq = inn.SkipDeepEquilibriumNetwork(cell, solver)
    stem = eqx.nn.Linear(64, size, key=stem_key)
    return Classifier(stem, deq, eqx.nn.Linear(size, 10, key=head_key))


# %% [markdown]
# ## Pretraining, and a penalty
#
# An equilibrium model learns its first steps faster as an ordinary deep network.
# `inn.set_fixed_depth(model, 5)` unrolls its cell five times and differentiates through
# that; `inn.set_fixed_depth(model, 0)` makes the same model implicit again. Nothing
# changes but a Python integer, so the state of the optimiser goes on working.
#
# `inn.skip_penalty` is the mean squared error between the equilibrium and the start. It
# teaches the start where the equilibrium is, and the cell to have it near the start. It
# has a weight of 0.01 in the paper, and of 1 here, since the state is small.

# %%
optimiser = optax.adam(2e-3)


@eqx.filter_jit
def train_step(model, state, x, y, weight):
    def loss_fn(model):
        logits, solution = jax.vmap(model.solve)(x)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
        loss += weight * inn.skip_penalty(solution)
        return loss, jnp.mean(solution.stats["nfe"])

    gradient, evaluations = eqx.filter_grad(loss_fn, has_aux=True)(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, evaluations


def train(model, *, weight, pretraining_steps=50, num_steps=250):
    """The trained model, and the evaluations of every step."""
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    rng = np.random.default_rng(0)
    evaluations = []
    for step in range(num_steps):
        if step == 0 and pretraining_steps > 0:
            model = inn.set_fixed_depth(model, 5)
        if step == pretraining_steps:
            model = inn.set_fixed_depth(model, 0)
        rows = rng.integers(0, 1500, 64)
        model, state, mean = train_step(
            model, state, pixels[rows], labels[rows], jnp.array(weight)
        )
        evaluations.append(mean)
    return model, np.asarray(evaluations)


@eqx.filter_jit
def test(model):
    logits, solution = jax.vmap(model.solve)(test_pixels)
    accuracy = jnp.mean(jnp.argmax(logits, 1) == test_labels)
    return accuracy, jnp.mean(solution.stats["nfe"]), inn.skip_penalty(solution)


def report(name, model):
    accuracy, evaluations, penalty = test(model)
    print(f"{name:26} {accuracy:8.1%} {evaluations:11.1f} {penalty:15.1e}")


print(f"{'':26} accuracy evaluations (z_star - z0)^2")
for kind in ("plain", "Skip", "Skip-regularised"):
    report(f"{kind}, before", make_model(kind))
models, costs = {}, {}
for kind in ("plain", "Skip", "Skip-regularised"):
    for weight in (0.0, 1.0):
        name = f"{kind}, weight {weight:.0f}"
        models[name], costs[name] = train(make_model(kind), weight=weight)
        report(name, models[name])

# %%
figure, axes = plt.subplots(layout="constrained")
for name, evaluations in costs.items():
    axes.plot(evaluations, label=name)
axes.axvline(50, color="grey", linestyle="--", linewidth=1)
axes.set(xlabel="training step", ylabel="evaluations of the cell")
axes.legend()
plt.show()

# %%
report(
    "plain, not pretrained",
    train(make_model("plain"), weight=0.0, pretraining_steps=0)[0],
)

# %% [markdown]
# ## Start from the last solve
#
# Where inputs change slowly, as in a video or from one time step to the next, the last
# equilibrium is a better start than any guess. A call's own `z0=` wins over the
# layer's start. Here one image becomes another in 20 frames.


# %%
def frames(first, last, num_frames=20):
    fade = jnp.linspace(0, 1, num_frames)[:, None]
    return (1 - fade) * first + fade * last


def follow(model, frames, warm):
    """The evaluations of each frame."""

    def one_frame(z, x):
        x = model.stem(x)
        solution = model.deq.solve(x, z0=z) if warm else model.deq.solve(x)
        return solution.z_star, solution.stats["nfe"]

    start = model.deq(model.stem(frames[0]))
    _, evaluations = lax.scan(one_frame, start, frames)
    return evaluations


videos = jax.vmap(frames)(test_pixels[:32], test_pixels[32:64])
figure, axes = plt.subplots(layout="constrained")
for name in ("plain, weight 0", "Skip, weight 1"):
    for warm in (False, True):
        run = eqx.filter_jit(jax.vmap(lambda v: follow(models[name], v, warm)))
        mean = jnp.mean(run(videos), axis=0)[1:]
        start = "from the last frame" if warm else "from the layer's start"
        print(f"{name}, {start}: {jnp.mean(mean):.1f} evaluations a frame")
        axes.plot(jnp.arange(1, 20), mean, label=f"{name}, {start}")
axes.set(xlabel="frame", ylabel="evaluations of the cell", ylim=(0, None))
axes.legend()
plt.show()
