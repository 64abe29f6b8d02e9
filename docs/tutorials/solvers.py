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
# # Choose a solver
#
# This page trains one model and solves it with every kind of solver. The cost of a
# solver is its evaluations of the cell. Its result is the relative residual $\lVert
# f(z) - z \rVert / \lVert f(z) \rVert$. `inn.residual_trace` records both, for any
# Optimistix solver.

# %%
import diffrax as dfx
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


# %% [markdown]
# ## A model to solve
#
# The model classifies scikit-learn's digits: a dense cell with 64 units between two
# linear layers.


# %%
class Cell(eqx.Module):
    hidden: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + x)


class Classifier(eqx.Module):
    stem: eqx.nn.Linear
    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.stem = eqx.nn.Linear(64, 64, key=keys[0])
        self.deq = inn.DeepEquilibriumNetwork(
            Cell(eqx.nn.Linear(64, 64, key=keys[1])),
            inn.AndersonAcceleration(rtol=1e-4, atol=0.0),
        )
        self.head = eqx.nn.Linear(64, 10, key=keys[2])

    def __call__(self, x):
        return self.head(self.deq(self.stem(x)))


pixels, labels = load_digits(return_X_y=True)
pixels = jnp.asarray(pixels / 16, jnp.float32)
classes = jnp.asarray(labels)
optimiser = optax.adam(3e-3)


def loss_fn(model, x, y):
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@eqx.filter_jit
def train_step(model, state, x, y):
    loss, gradient = eqx.filter_value_and_grad(loss_fn)(model, x, y)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, loss


model = Classifier(jr.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_array))
rng = np.random.default_rng(0)
for step in range(300):
    rows = rng.integers(0, 1500, 64)
    model, state, _ = train_step(model, state, pixels[rows], classes[rows])


@eqx.filter_jit
def accuracy(model):
    found = jnp.argmax(jax.vmap(model)(pixels[1500:]), axis=1)
    return jnp.mean(found == classes[1500:])


print(f"accuracy on the last 297 images: {accuracy(model):.1%}")

# %% [markdown]
# ## Every solver
#
# There are root finders, fixed-point solvers, and ODE solvers that follow
# $\dot z = f(z, x) - z$ until it rests. In a layer, an ODE solver alone is short for
# `inn.SteadyState` of it.

# %%
solvers = {
    "plain iteration": optx.FixedPointIteration(0.0, 1e-5, norm=optx.two_norm),
    "Anderson": inn.AndersonAcceleration(1e-5, 0.0),
    "Broyden": inn.Broyden(1e-5, 0.0),
    "Newton-Krylov": inn.NewtonKrylov(1e-5, 0.0),
    "Newton": optx.Newton(1e-5, 1e-5),
    "Tsit5": inn.SteadyState(dfx.Tsit5(), 1e-5, 0.0),
    "VCABM3": inn.SteadyState(inn.VCABM3(), 1e-5, 0.0),
}
cell = model.deq.cell
xs = jax.vmap(model.stem)(pixels[1500:1564])


def trace(solver):
    def one(x):
        return inn.residual_trace(cell, solver, jnp.zeros(64), x, max_steps=100)

    return jax.jit(jax.vmap(one))(xs)


traces = {name: trace(solver) for name, solver in solvers.items()}
print("medians of 64 images   steps  evaluations  converged")
for name, found in traces.items():
    evaluations = "" if found.nfe is None else int(np.median(found.nfe[:, -1]))
    converged = int(jnp.sum(found.result == optx.RESULTS.successful))
    steps = int(np.median(found.num_steps))
    print(f"{name:20} {steps:7} {evaluations:12} {converged:10}")

# %%
axes = plot.convergence(traces)
axes.set(xlim=(0, 120), ylim=(1e-6, 2))
plt.show()

# %% [markdown]
# Not every solver succeeds on every image, and each says so. Newton-Krylov only takes
# steps that lessen the residual, so it can stop at a local minimum of the residual. The
# other solvers let the residual grow on the way, and leave such a minimum.
#
# The slope of plain iteration is the spectral radius of the cell's Jacobian at the
# equilibrium. The eigenvalues show what acceleration can gain: it removes a few large
# ones that stand apart from a cluster near zero.

# %%
x = xs[0]
plot.spectrum(cell, eqx.filter_jit(model.deq)(x), x)
plt.show()

# %% [markdown]
# ## Swap it
#
# The trained model runs with any of them. `eqx.tree_at` changes the solver and nothing
# else.

# %%
for name in ("Broyden", "Newton-Krylov", "VCABM3"):
    swapped = eqx.tree_at(lambda m: m.deq.solver, model, solvers[name])
    print(f"{name:16} accuracy {accuracy(swapped):.1%}")

# %% [markdown]
# ## Which one?
#
# * `inn.AndersonAcceleration`, the default, needs few evaluations and adds little work.
# * `inn.Broyden` builds an inverse Jacobian, which `inn.ShineAdjoint` uses.
# * `inn.NewtonKrylov` reaches high accuracy: it converges superlinearly near the
#   equilibrium.
# * ODE solvers suit cells that are stable as a flow but not as an iteration: their
#   eigenvalues lie far to the left, where plain iteration diverges.
