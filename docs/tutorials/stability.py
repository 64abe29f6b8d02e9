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
# # Keep it stable
#
# A loss does not ask for equilibria that are easy to find, so training can make them
# hard to find. This page shows how that looks on a small classifier of scikit-learn's
# digits, and measures five remedies.

# %%
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from sklearn.datasets import load_digits

import implicitnets as inn
from implicitnets import plot


pixels, labels = load_digits(return_X_y=True)
pixels = jnp.asarray(pixels / 16, jnp.float32)
labels = jnp.asarray(labels)
test_pixels, test_labels = pixels[1500:], labels[1500:]


# %% [markdown]
# ## A training run
#
# The model is a dense cell of 64 units between two linear layers. To make trouble, its
# initial weights are twice as large as usual, the learning rate is high, the solver has
# 30 steps and the adjoint 60 products.


# %%
class Cell(eqx.Module):
    hidden: eqx.nn.Linear

    def __init__(self, *, key):
        linear = eqx.nn.Linear(64, 64, key=key)
        self.hidden = eqx.tree_at(lambda x: x.weight, linear, 2 * linear.weight)

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + x)


class Classifier(eqx.Module):
    stem: eqx.nn.Linear
    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear


def make_model(
    cell: Any = Cell(key=jr.key(1)),
    solver: Any = inn.AndersonAcceleration(rtol=1e-4, atol=0.0),
    adjoint=inn.ImplicitAdjoint(inn.GivensGMRES(1e-4, 0.0, max_steps=60)),
):
    stem_key, head_key = jr.split(jr.key(0))
    deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=adjoint, max_steps=30)
    stem = eqx.nn.Linear(64, 64, key=stem_key)
    return Classifier(stem, deq, eqx.nn.Linear(64, 10, key=head_key))


# %% [markdown]
# A training step also returns which forward and backward solves were successful. A
# backward pass can return nothing but gradients, so its report is the gradient with
# respect to a *probe*, one for each example. `penalty(model, z, x, step, key)` is added
# to the loss.

# %%
optimiser = optax.adam(1e-2)


@eqx.filter_jit
def train_step(model, state, x, y, step, key, penalty):
    def loss_fn(model_and_probe):
        model, probe = model_and_probe
        features = jax.vmap(model.stem)(x)
        solve = jax.vmap(lambda x, probe: model.deq.solve(x, probe=probe))
        solution = solve(features, probe)
        logits = jax.vmap(model.head)(solution.z_star)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
        loss += penalty(model, solution.z_star, features, step, key)
        return loss, solution

    probe = inn.AdjointReport.probe((len(x),))
    gradient = eqx.filter_grad(loss_fn, has_aux=True)
    (gradient, report), solution = gradient((model, probe))
    updates, state = optimiser.update(gradient, state)
    record = {
        "forward": jnp.mean(solution.result == optx.RESULTS.successful),
        "backward": jnp.mean(report.successful),
        "gradient norm": optax.global_norm(gradient),
    }
    return eqx.apply_updates(model, updates), state, record


def train(model, penalty=lambda *unused: 0.0, num_steps=120):
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    rng = np.random.default_rng(0)
    records = []
    for step, key in enumerate(jr.split(jr.key(2), num_steps)):
        rows = rng.integers(0, 1500, 64)
        model, state, record = train_step(
            model, state, pixels[rows], labels[rows], jnp.array(step), key, penalty
        )
        records.append({"step": step} | jax.device_get(record))
    return model, records


@eqx.filter_jit
def test(model):
    features = jax.vmap(model.stem)(test_pixels)
    solution = jax.vmap(model.deq.solve)(features)
    predicted = jnp.argmax(jax.vmap(model.head)(solution.z_star), 1)
    radius = jax.vmap(
        lambda z, x: inn.spectral_radius(model.deq.cell, z, x, key=jr.key(3))
    )(solution.z_star, features)
    return jnp.mean(predicted == test_labels), solution, radius


def report(name, model):
    accuracy, solution, radius = test(model)
    success = jnp.mean(solution.result == optx.RESULTS.successful)
    print(
        f"{name:24} accuracy {accuracy:6.1%}  solved {success:6.1%}  "
        f"evaluations {jnp.mean(solution.stats['nfe']):5.1f}  "
        f"spectral radius {jnp.median(radius):.2f}"
    )


plain, plain_records = train(make_model())
report("before training", make_model())
report("trained", plain)

# %% [markdown]
# ## What it looks like
#
# `solution.result` counts the solves that failed, since none of them raises. The
# residuals show how far they came. The spectrum of the cell's Jacobian at the
# equilibrium shows why: plain iteration converges if it lies in the unit circle,
# acceleration reaches a little further, and there is no gradient at an eigenvalue of 1.


# %%
@eqx.filter_jit
def trace(model):
    def one_example(pixels):
        deq, x = model.deq, model.stem(pixels)
        return inn.residual_trace(deq.cell, deq.solver, deq.start(x), x, max_steps=100)

    return jax.vmap(one_example)(test_pixels[:64])


@eqx.filter_jit
def equilibrium(model):
    x = model.stem(test_pixels[0])
    return model.deq(x), x


figure, axes = plt.subplots(2, 2, layout="constrained", figsize=(8, 6))
plot.training(plain_records, ["forward", "backward"], axes=axes[0, 0])
axes[0, 0].set(ylabel="successful solves", ylim=(-0.05, 1.05))
traces = {"before": trace(make_model()), "trained": trace(plain)}
plot.convergence(traces, axes=axes[0, 1])
for name, model, axis in zip(traces, (make_model(), plain), axes[1]):
    plot.spectrum(model.deq.cell, *equilibrium(model), axes=axis)
    axis.set(title=name)
plt.show()


# %% [markdown]
# ## Penalise the Jacobian
#
# `inn.jacobian_penalty` estimates, from one random vector, the mean squared norm of an
# output's gradient with respect to the state, at the equilibrium. `inn.sometimes`
# computes it in a random part of the steps only, and `inn.growing_weight` is a schedule
# for its weight.
#
# The weight is a trade-off. If it is too small, solves still fail; if it is too large,
# the cell ignores its state.

# %%
weight = inn.growing_weight(initial=1.0, increment=1.0, every=60)


def penalty(model, z, x, step, key):
    def mean(key):
        def one_example(z, x, key):
            return inn.jacobian_penalty(model.deq.cell, z, x, key=key)

        return jnp.mean(jax.vmap(one_example)(z, x, jr.split(key, len(x))))

    return weight(step) * inn.sometimes(0.3, mean, key=key)


penalised, _ = train(make_model(), penalty)
report("Jacobian penalty", penalised)
plot.convergence({"plain": trace(plain), "Jacobian penalty": trace(penalised)})
plt.show()

# %% [markdown]
# ## Take a cell with a guarantee
#
# `inn.nn.spectral_norm` bounds the two-norm of each weight. The slope of `tanh` is at
# most one, so a bound of 0.9 makes the cell a contraction. It has one equilibrium,
# plain iteration finds it, and it can express less. `inn.nn.WellPosedCell` is a
# contraction in the maximum norm by construction. `inn.nn.MonotoneCell` has one
# equilibrium whatever its weights, also where its spectral radius is above one and
# plain iteration diverges. Solve it by operator splitting, which always converges.

# %%
normalised = inn.nn.spectral_norm(Cell(key=jr.key(1)), bound=0.9)
report("spectral norm", train(make_model(normalised))[0])
monotone = inn.nn.MonotoneCell(64, 64, key=jr.key(1))
solver = inn.PeacemanRachford(rtol=1e-4, atol=0.0)
report("MonotoneCell", train(make_model(monotone, solver))[0])

# %% [markdown]
# ## Start small, behind a loud stem
#
# A cell mostly has weights for its input, too. If all start large, solves fail before
# any training. If all start small, solves are short, but the state hardly depends on
# the input, and training starts slowly. Larger weights in stem and head make up for it:
# `inn.nn.initialise` draws them He-uniform. Accuracies are those after 30 steps.


# %%
class MixingCell(eqx.Module):
    state: eqx.nn.Linear
    inject: eqx.nn.Linear
    mix: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.mix(jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))))


cell = MixingCell(*(eqx.nn.Linear(64, 64, key=key) for key in jr.split(jr.key(1), 3)))
initialisers = jax.nn.initializers.normal(0.01), jax.nn.initializers.he_uniform(1, 0)
for name, initialiser in zip(("small", "large"), initialisers):
    quiet = make_model(inn.nn.initialise(cell, initialiser, key=jr.key(5)))
    ends = inn.nn.initialise((quiet.stem, quiet.head), key=jr.key(4))
    loud = eqx.tree_at(lambda model: (model.stem, model.head), quiet, ends)
    report(f"{name} cell, untrained", loud)
    for stem, model in {"Equinox": quiet, "He-uniform": loud}.items():
        report(f"{name} cell, {stem}", train(model, num_steps=30)[0])

# %% [markdown]
# ## Catch what fails
#
# A backward solve that fails returns the best solution that it found, which may be
# large and point the wrong way. With a `fallback`, the examples whose solve failed get
# another gradient, here five terms of a damped Neumann series, which cannot fail. To
# show the difference, the linear solver has ten products instead of 60.

# %%
short = inn.GivensGMRES(rtol=1e-4, atol=0.0, max_steps=10)
series = inn.NeumannSeries(5, damping=0.5)
adjoints = {
    "ten products": inn.ImplicitAdjoint(short),
    "and a fallback": inn.ImplicitAdjoint(short, fallback=series),
}
for name, adjoint in adjoints.items():
    model, records = train(make_model(adjoint=adjoint))
    # A test needs no gradient, and the test with this adjoint is compiled already.
    report(name, eqx.tree_at(lambda m: m.deq.adjoint, model, plain.deq.adjoint))
    norms = np.array([record["gradient norm"] for record in records])
    failed = 1 - np.mean([record["backward"] for record in records])
    print(
        f"{'':24} failed backward solves {failed:.1%}, "
        f"gradient norm: median {np.median(norms):.2f}, largest {norms.max():.2f}"
    )

# %% [markdown]
# ## What to do
#
# Start with a small cell behind a loud stem. Penalise the Jacobian if more solves fail
# as training goes on. Normalise the weights, or take a cell with a guarantee, if no
# solve may fail. Give a fallback, or clip the gradient, if backward solves fail.
# [How to choose](../../choose/) has a table of symptoms.
