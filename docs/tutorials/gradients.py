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
# The gradient of an equilibrium is the solution of a linear system
# ([Gradients](../../theory/gradients/)). To solve it exactly costs about as much as the
# forward solve. This page compares the cheaper gradients: how wrong are they, and in
# which direction?

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
# The cell is $f(z, x) = \tanh(W z + x)$ with a random $W$ of a given spectral radius.
# Near one, the end of a long chain of applications still matters, and a gradient that
# sees only a few of them misses most of it.


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
    """The gradient of one loss and its cost, a row for every radius."""
    reports = isinstance(adjoint, inn.AbstractReportingAdjoint)
    probe = inn.AdjointReport.probe() if reports else None

    @eqx.filter_jit
    def gradient(cell):
        def loss(cell_and_probe):
            cell, probe = cell_and_probe
            solver = inn.Broyden(rtol=1e-6, atol=0.0)
            deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=adjoint)
            solution = deq.solve(x, probe=probe)
            return jnp.dot(solution.z_star, direction), solution.stats["nfe"]

        return eqx.filter_grad(loss, has_aux=True)((cell, probe))

    found, costs = [], []
    for cell in cells:
        (gradient_of_cell, report), nfe = gradient(cell)
        found.append(gradient_of_cell.weight.reshape(-1))
        costs.append(num_products(adjoint, report, nfe))
    return jnp.stack(found), costs


def num_products(adjoint, report, nfe):
    """What the adjoint reports, or what its definition says."""
    if report is not None:
        return int(report.num_steps)
    if isinstance(adjoint, inn.JacobianFreeAdjoint):
        return 0
    if isinstance(adjoint, inn.PhantomAdjoint):
        return adjoint.num_steps - 1
    return int(nfe)  # unrolled: one for every evaluation


exact, _ = gradients(inn.ImplicitAdjoint(inn.GivensGMRES(1e-6, 0.0)))


def compare(adjoint):
    """The relative error, the cosine to the exact gradient, and the products."""
    found, costs = gradients(adjoint)
    found_norm, exact_norm = (jnp.linalg.norm(g, axis=1) for g in (found, exact))
    error = jnp.linalg.norm(found - exact, axis=1) / exact_norm
    cosine = jnp.sum(found * exact, axis=1) / (found_norm * exact_norm)
    return error, cosine, costs


# %% [markdown]
# ## Every adjoint
#
# An adjoint is one constructor argument. The table has each gradient's relative error,
# its cosine to the exact gradient, and the number of products with the cell's Jacobian
# that the backward pass makes.

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
rows = {name: compare(adjoint) for name, adjoint in adjoints.items()}
print(f"{'':20}" + "".join(f"{f'radius {radius}':>19}" for radius in radii))
print(f"{'':20}" + len(radii) * "  error cosine prod.")
for name, columns in rows.items():
    row = "".join(f"{e:7.0e}{c:7.3f}{p:5}" for e, c, p in zip(*columns))
    print(f"{name:20}{row}")

# %%
figure, axes = plt.subplots(layout="constrained")
for name, (errors, _, _) in rows.items():
    axes.semilogy([str(r) for r in radii], errors, marker="o", label=name)
axes.set(xlabel="spectral radius", ylabel="relative error of the gradient")
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# ## Did it work?
#
# A backward pass returns nothing but gradients, so its report is one too. Give the
# layer a probe of zeros: the gradient with respect to the probe has the steps of the
# linear solve, its residual and its result. This works in `jit` and `vmap`, and is free
# without a probe.


# %%
@eqx.filter_jit
@eqx.filter_grad
def report_on(probe, max_steps):
    adjoint = inn.ImplicitAdjoint(inn.GivensGMRES(1e-4, 0.0, max_steps=max_steps))
    deq = inn.DeepEquilibriumNetwork(cells[1], adjoint=adjoint)
    return jnp.dot(deq(x, probe=probe), direction)


for max_steps in (100, 5):
    report = report_on(inn.AdjointReport.probe(), max_steps)
    print(
        f"{report.num_steps:3.0f} products, residual {report.residual:.1e}, "
        f"successful: {bool(report.successful)}"
    )

# %% [markdown]
# If the linear solve fails, the gradient uses the best solution that it found. With a
# `fallback`, the systems that failed are solved by something that cannot fail: here
# five terms of a damped Neumann series, which is the phantom gradient.

# %%
cautious = inn.ImplicitAdjoint(
    inn.GivensGMRES(1e-4, 0.0, max_steps=5), fallback=inn.NeumannSeries(5, damping=0.5)
)
error, cosine, _ = compare(cautious)
print(f"at radius 0.9: relative error {error[1]:.2f}, cosine {cosine[1]:.3f}")

# %% [markdown]
# ## Which one?
#
# * `inn.ImplicitAdjoint`, the default, where the gradient matters as a number: physics,
#   second derivatives, sensitivities, small models.
# * `inn.PhantomAdjoint` or `inn.JacobianFreeAdjoint`, to train large networks fast,
#   with a penalty that keeps the spectral radius down.
# * `inn.ShineAdjoint`, if Broyden's method solves anyway.
# * `optx.RecursiveCheckpointAdjoint()`, if the solver stops so early that its steps are
#   the model.
