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
# # Choose a gradient
#
# The gradient of an equilibrium is the solution of a linear system (see
# [Gradients](../../theory/gradients/)). Solving it exactly costs about what the forward
# solve costs. This page puts what is cheaper beside it: how wrong is it, and in which
# direction?

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optimistix as optx

import implicitnets as inn


# %% [markdown]
# ## A cell of known difficulty
#
# $f(z, x) = \tanh(W z + x)$ with a random $W$ of a given spectral radius: near one,
# what happens at the end of a long chain of applications still matters, and a gradient
# that looks at a few of them misses most of it.


# %%
class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def make_cell(radius, size=64):
    weight = jr.normal(jr.key(0), (size, size))
    largest = jnp.max(jnp.abs(jnp.linalg.eigvals(weight)))
    return Cell(weight * radius / largest)


x = 0.1 * jr.normal(jr.key(1), (64,))
direction = jr.normal(jr.key(2), (64,))


radii = (0.5, 0.9, 0.99)
cells = [make_cell(radius) for radius in radii]


def gradients(adjoint):
    """Of one loss with respect to the weights, a row for every radius."""

    @jax.jit
    @jax.grad
    def gradient(cell):
        solver = inn.Broyden(rtol=1e-6, atol=0.0)
        deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=adjoint)
        return jnp.dot(deq(x), direction)

    return jnp.stack([gradient(cell).weight.reshape(-1) for cell in cells])


def relative_errors(adjoint):
    wrong = jnp.linalg.norm(gradients(adjoint) - exact, axis=1)
    return wrong / jnp.linalg.norm(exact, axis=1)


exact = gradients(inn.ImplicitAdjoint(inn.GivensGMRES(1e-6, 0.0)))

# %% [markdown]
# ## Every adjoint
#
# One constructor argument each. The number of Jacobian products is what it costs.

# %%
adjoints = {
    "implicit": inn.ImplicitAdjoint(),
    "Jacobian-free": inn.JacobianFreeAdjoint(),
    "phantom, 5 steps": inn.PhantomAdjoint(5),
    "phantom, 20 steps": inn.PhantomAdjoint(20),
    "Neumann, 5 terms": inn.NeumannAdjoint(5),
    "SHINE": inn.ShineAdjoint(),
    "SHINE, 5 refinements": inn.ShineAdjoint(5),
    "unrolled": optx.RecursiveCheckpointAdjoint(),
}
errors = {name: relative_errors(adjoint) for name, adjoint in adjoints.items()}
print(f"{'relative error at radius':26}" + "".join(f"{r:>10}" for r in radii))
for name, values in errors.items():
    print(f"{name:26}" + "".join(f"{error:10.1e}" for error in values))

# %%
figure, axes = plt.subplots(layout="constrained")
for name, values in errors.items():
    axes.semilogy([str(r) for r in radii], values, marker="o", label=name)
axes.set(xlabel="spectral radius", ylabel="relative error of the gradient")
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# ## Did it work?
#
# The backward pass cannot return anything but gradients. So its report is one: give
# the layer a probe of zeros, and the gradient with respect to the probe has the steps
# of the linear solve, its residual and its result. That works in `jit` and `vmap`, and
# costs nothing without a probe.


# %%
def loss(cell, probe, max_steps):
    adjoint = inn.ImplicitAdjoint(inn.GivensGMRES(1e-4, 0.0, max_steps=max_steps))
    deq = inn.DeepEquilibriumNetwork(cell, adjoint=adjoint)
    return jnp.dot(deq(x, probe=probe), direction)


for max_steps in (100, 5):
    _, report = jax.grad(loss, argnums=(0, 1))(
        cells[1], inn.AdjointReport.probe(), max_steps
    )
    print(
        f"{report.num_steps:3.0f} products, residual {report.residual:.1e}, "
        f"successful: {bool(report.successful)}"
    )

# %% [markdown]
# What should happen when the linear solve fails? By default the best that it found is
# used. With a `fallback`, the systems that failed, and only those, are solved by
# something that cannot fail: here five terms of a damped Neumann series, which is the
# phantom gradient.

# %%
cautious = inn.ImplicitAdjoint(
    inn.GivensGMRES(1e-4, 0.0, max_steps=5), fallback=inn.NeumannSeries(5, damping=0.5)
)
print(f"relative error at radius 0.9: {relative_errors(cautious)[1]:.2f}")

# %% [markdown]
# ## Which one?
#
# * `inn.ImplicitAdjoint`, the default, wherever the gradient matters as a
#   number: physics, second derivatives, sensitivity, small models.
# * `inn.PhantomAdjoint` or `inn.JacobianFreeAdjoint` to train
#   large networks fast, with a penalty that keeps the spectral radius down.
# * `inn.ShineAdjoint` if Broyden's method solves anyway.
# * `optx.RecursiveCheckpointAdjoint()` when the solver stops so early that its steps,
#   and not an equilibrium, are the model.
