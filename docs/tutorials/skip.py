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
# The cost of a solve depends on its start. This page trains a classifier of
# scikit-learn's digits with three kinds of start ([Pal et al.,
# 2022](https://arxiv.org/abs/2201.12240)), pretrains it by unrolling, and starts solves
# at earlier equilibria.

# %%
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits

import implicitnets as inn


pixels, labels = load_digits(return_X_y=True)
pixels = jnp.asarray(pixels / 16, jnp.float32)
labels = jnp.asarray(labels)
test_pixels, test_labels = pixels[1500:], labels[1500:]


# %% [markdown]
# ## Three starts
#
# * plain starts at zero;
# * *Skip* starts at `init(x)`, an explicit network that is trained along;
# * *Skip-regularised* starts at `cell(0, x)`, and has no more parameters.


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
        deq = inn.DeepEquilibriumNetwork(cell, solver, max_steps=50)
    else:
        mlp = eqx.nn.MLP(size, size, size, depth=1, key=init_key)
        init = mlp if kind == "Skip" else None
        deq = inn.SkipDeepEquilibriumNetwork(cell, solver, init=init, max_steps=50)
    stem = eqx.nn.Linear(64, size, key=stem_key)
    return Classifier(stem, deq, eqx.nn.Linear(size, 10, key=head_key))


# %% [markdown]
# ## Pretraining, and a penalty
#
# An equilibrium model learns its first steps faster as an ordinary deep network.
# `inn.set_fixed_depth(model, 5)` unrolls its cell five times and differentiates through
# that. `inn.set_fixed_depth(model, 0)` makes the model implicit again. Only a Python
# integer changes, so the optimiser's state goes on working.
#
# `inn.skip_penalty` is the mean squared error between the equilibrium and the start. It
# teaches the start where the equilibrium is, and the cell to keep the equilibrium near.
# Its weight is 0.01 in the paper, and 1 here, where the state is small.

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


def run(model, state, num_steps, weight, rng):
    evaluations = []
    for _ in range(num_steps):
        rows = rng.integers(0, 1500, 64)
        model, state, mean = train_step(
            model, state, pixels[rows], labels[rows], jnp.array(weight)
        )
        evaluations.append(mean)
    return model, state, np.asarray(evaluations)


def train(model, *, weight, pretraining_steps=50, num_steps=200):
    """The trained model, the optimiser's state, the evaluations of each step."""
    rng = np.random.default_rng(0)
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    model = inn.set_fixed_depth(model, 5)
    model, state, _ = run(model, state, pretraining_steps, weight, rng)
    model = inn.set_fixed_depth(model, 0)
    return run(model, state, num_steps, weight, rng)


@eqx.filter_jit
def test(model):
    logits, solution = jax.vmap(model.solve)(test_pixels)
    return {
        "accuracy": jnp.mean(jnp.argmax(logits, 1) == test_labels),
        "solved": jnp.mean(solution.result == optx.RESULTS.successful),
        "evaluations": jnp.mean(solution.stats["nfe"]),
        "distance": inn.skip_penalty(solution),
    }


def report(name, model):
    row = test(model)
    print(
        f"{name:31} {row['accuracy']:8.1%} {row['solved']:7.0%} "
        f"{row['evaluations']:11.1f} {row['distance']:8.2f}"
    )


runs = {
    "plain, no penalty": ("plain", 0.0),
    "plain": ("plain", 1.0),
    "Skip": ("Skip", 1.0),
    "Skip-regularised": ("Skip-regularised", 1.0),
}
models, states, costs = {}, {}, {}
print(f"{'':31} accuracy  solved evaluations distance")
for name, (kind, weight) in runs.items():
    trained = train(make_model(kind), weight=weight)
    models[name], states[name], costs[name] = trained
    report(name, models[name])
count = optax.tree.get(states["Skip"], "count")
print(f"Adam has counted {count} steps, through the switch.")

# %%
figure, axes = plt.subplots(layout="constrained")
for name, evaluations in costs.items():
    axes.plot(evaluations, label=name)
axes.set(xlabel="step after pretraining", ylabel="evaluations of the cell")
axes.legend()
plt.show()

# %% [markdown]
# The distance is the penalty, without its weight. Five layers trained as such need not
# lead to an equilibrium, so the model without a penalty has to find one after the
# switch. With the penalty the switch is smooth, and both predicted starts are closer to
# the equilibrium than zero and take fewer evaluations.
#
# To see what pretraining saves, train the same model implicitly from the first step:

# %%
model, _, cost = train(
    make_model("plain"), weight=1.0, pretraining_steps=0, num_steps=250
)
report("plain, not pretrained", model)
total = 5 * 50 + np.sum(costs["plain"])
print(
    f"evaluations of an example in training: {np.sum(cost):.0f}, {total:.0f} pretrained"
)

# %% [markdown]
# ## Start from the last solve
#
# If inputs change slowly, as in a video or from one time step to the next, the last
# equilibrium is the best start. The `z0=` of a call replaces the layer's start. Here
# one image turns into another in 20 frames.


# %%
@eqx.filter_jit
def follow(model, videos, warm):
    """The mean evaluations of every frame after the first."""

    def one_frame(z, x):
        x = model.stem(x)
        solution = model.deq.solve(x, z0=z if warm else None)
        return solution.z_star, solution.stats["nfe"]

    def one_video(frames):
        start = model.deq(model.stem(frames[0]))
        _, evaluations = lax.scan(one_frame, start, frames[1:])
        return evaluations

    return jnp.mean(jax.vmap(one_video)(videos), axis=0)


fade = jnp.linspace(0, 1, 21)[:, None]
first, last = test_pixels[:32, None], test_pixels[32:64, None]
videos = (1 - fade) * first + fade * last

figure, axes = plt.subplots(layout="constrained")
for name in ("plain", "Skip"):
    for warm in (False, True):
        evaluations = follow(models[name], videos, warm)
        start = "the last frame" if warm else "the layer's start"
        print(f"{name}, from {start}: {jnp.mean(evaluations):.1f} evaluations")
        axes.plot(jnp.arange(1, 21), evaluations, label=f"{name}, from {start}")
axes.set(xlabel="frame", ylabel="evaluations of the cell", ylim=(0, None))
axes.xaxis.set_major_locator(MaxNLocator(integer=True))
axes.legend()
plt.show()

# %% [markdown]
# The same works in training for a batch that comes again: keep its equilibria, and pass
# them as `z0` the next time.
