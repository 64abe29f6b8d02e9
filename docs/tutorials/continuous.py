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
# # Continuous DEQs and neural ODEs
#
# The flow $\dot z = f(z, x) - z$ rests at the equilibrium $z^\star = f(z^\star, x)$. An
# ODE solver that follows the flow to rest makes a *continuous* DEQ. An ODE solver that
# stops at a finite time makes a *neural ODE*. This page follows one cell along these
# paths, and counts what each costs.

# %%
import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import implicitnets as inn
from implicitnets import plot


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


# %% [markdown]
# ## Follow the flow
#
# This cell lives in the plane. Its Jacobian at the origin has the eigenvalues
# $-1.2 \pm \mathrm{i}$. They lie outside the unit circle, so the plain iteration
# $z \leftarrow f(z, x)$ leaves the equilibrium there. They lie left of $1$, so the flow
# comes to rest in it.

# %%
spiral = Cell(jnp.array([[-1.2, 1.0], [-1.0, -1.2]]))
origin = jnp.zeros(2)
starts = jnp.array([[0.9, 0.9], [-0.9, 0.7], [-0.8, -0.9], [0.8, -0.8]])


@jax.jit
@jax.vmap
def flow(z0):
    """The states at equal time steps."""
    solution = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, z, args: spiral(z, origin) - z),
        dfx.Tsit5(),
        t0=0,
        t1=4,
        dt0=0.1,
        y0=z0,
        saveat=dfx.SaveAt(ts=jnp.linspace(0, 4, 200)),
        stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
    )
    return solution.ys


def iterate(z, num_steps=12):
    states = [z]
    for _ in range(num_steps):
        states.append(spiral(states[-1], origin))
    return jnp.stack(states)


figure, axes = plt.subplots(
    1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained"
)
axes[0].plot(*iterate(starts[0]).T, ".-", linewidth=0.7)
axes[0].set(title="iteration", xlabel="$z_1$", ylabel="$z_2$")
for path in flow(starts):
    axes[1].plot(*path.T)
    axes[1].plot(*path[0], ".", color="grey")
axes[1].set(title="flow", xlabel="$z_1$")
for axis in axes:
    axis.plot(0, 0, "x", color="C3")
    axis.set_aspect("equal")
plt.show()

# %% [markdown]
# Give the layer an ODE solver like any other solver. `dfx.Tsit5()` is short for
# `inn.SteadyState(dfx.Tsit5())`, which stops where the equation holds to the
# tolerances.

# %%
for name, solver in {
    "plain iteration": optx.FixedPointIteration(1e-4, 1e-6),
    "Tsit5": dfx.Tsit5(),
}.items():
    deq = inn.DeepEquilibriumNetwork(spiral, solver)
    solution = eqx.filter_jit(deq.solve)(origin, z0=starts[0])
    success = bool(solution.result == optx.RESULTS.successful)
    print(f"{name:15}  z* = {np.round(solution.z_star, 4)}  successful: {success}")

# %% [markdown]
# ## What a step size is for
#
# The next cell has 64 units and a spectral radius of 0.9, as in
# [Choose a gradient](../gradients/). It contracts, so discrete solvers find its
# equilibria too.


# %%
def make_cell(radius, size=64):
    weight = jr.normal(jr.key(0), (size, size))
    largest = jnp.max(jnp.abs(jnp.linalg.eigvals(weight)))
    return Cell(weight * radius / largest)


cell = make_cell(0.9)
xs = 0.1 * jr.normal(jr.key(1), (32, 64))


def trace(solver):
    def one(x):
        return inn.residual_trace(cell, solver, jnp.zeros(64), x, max_steps=100)

    return jax.jit(jax.vmap(one))(xs)


loose = dfx.PIDController(rtol=1e-3, atol=1e-3)
traces = {
    "Anderson": trace(inn.AndersonAcceleration(1e-5, 0.0)),
    "VCABM3": trace(inn.SteadyState(inn.VCABM3(), 1e-5, 0.0)),
    "Tsit5": trace(inn.SteadyState(dfx.Tsit5(), 1e-5, 0.0)),
    "Tsit5, PID": trace(
        inn.SteadyState(dfx.Tsit5(), 1e-5, 0.0, stepsize_controller=loose)
    ),
}
print("medians of 32 inputs  steps  evaluations  converged")
for name, found in traces.items():
    evaluations = int(np.median(found.nfe[:, -1]))
    converged = int(jnp.sum(found.result == optx.RESULTS.successful))
    steps = int(np.median(found.num_steps))
    print(f"{name:20} {steps:6} {evaluations:12} {converged:10}")

# %%
axes = plot.convergence(traces)
axes.set(xlim=(0, 250), ylim=(1e-6, 2))
plt.show()

# %% [markdown]
# `dfx.PIDController` keeps the *path* accurate. Near the end, where hardly anything
# moves, it takes the longest stable steps, and the residual stays at the controller's
# tolerance. The layer does not need the path. So the default controller of
# `inn.SteadyState` is `inn.PseudoTransient`, which allows an error as large as the
# progress of the step, and reaches any tolerance.
#
# `inn.VCABM3`, a multistep method, evaluates the cell twice per step, and Tsit5 six
# times.
#
# Long steps can make a cell that turns much faster than the spiral circle around its
# equilibrium for ever. The result of the solve says so, and
# `inn.PseudoTransient(safety=0.3)` takes shorter steps.
#
# ## Stop in time: a neural ODE
#
# `inn.NeuralODE` follows the flow from time 0 to `t1`. The state there is not an
# equilibrium, and the solution's residual says how far away it is.

# %%
x = xs[0]
z_star = inn.DeepEquilibriumNetwork(cell, inn.Broyden(1e-6, 0.0))(x)


@eqx.filter_jit
def follow(t1):
    return inn.NeuralODE(cell, dfx.Tsit5(), t1=t1).solve(x)


print("time  evaluations  relative distance to the equilibrium")
for t1 in (1.0, 2.0, 5.0, 10.0, 20.0, 40.0):
    # An array, so that all times share one compiled program.
    solution = follow(jnp.array(t1))
    distance = jnp.linalg.norm(solution.z_star - z_star) / jnp.linalg.norm(z_star)
    print(f"{t1:4.0f} {solution.stats['nfe']:12} {distance:10.1e}")

# %% [markdown]
# The neural ODE approaches the equilibrium at the speed of the flow. The steady-state
# solvers above leave the path and arrive sooner.
#
# ## What a gradient costs
#
# The gradient of an equilibrium needs the equilibrium alone: one linear system, solved
# by products with the cell's Jacobian, whatever the solver did. The gradient of a
# neural ODE needs its path: one product for every evaluation, and the evaluation again,
# since Diffrax keeps only some of the states.
#
# This cell counts its evaluations:


# %%
class Counted(eqx.Module):
    cell: Cell

    def __call__(self, z, x):
        jax.debug.callback(lambda: calls.append(1))
        return self.cell(z, x)


calls = []


def num_evaluations(function, *args):
    calls.clear()
    out = jax.block_until_ready(eqx.filter_jit(function)(*args))
    jax.effects_barrier()
    return len(calls), out


def loss(layer_and_probe):
    layer, probe = layer_and_probe
    # A neural ODE has no linear solve to report on.
    options = {} if probe is None else {"probe": probe}
    solution = layer.solve(x, **options)
    return jnp.sum(solution.z_star**2), solution.stats["nfe"]


gradient = eqx.filter_grad(loss, has_aux=True)
counted = Counted(cell)
probe = inn.AdjointReport.probe()
layers = {
    "DEQ, Anderson": (inn.DeepEquilibriumNetwork(counted), probe),
    "DEQ, Tsit5": (inn.DeepEquilibriumNetwork(counted, dfx.Tsit5()), probe),
    "ODE, time 5": (inn.NeuralODE(counted, dfx.Tsit5(), t1=jnp.array(5.0)), None),
    "ODE, time 20": (inn.NeuralODE(counted, dfx.Tsit5(), t1=jnp.array(20.0)), None),
}
costs = {}
for name, layer_and_probe in layers.items():
    forward, (_, nfe) = num_evaluations(loss, layer_and_probe)
    both, ((_, report), _) = num_evaluations(gradient, layer_and_probe)
    # Reverse mode is one product for every evaluation.
    products = nfe if report is None else report.num_steps
    costs[name] = forward, both - forward, int(products)

print("              evaluations           products")
print("              forward    backward   backward")
for name, (forward, backward, products) in costs.items():
    print(f"{name:14} {forward:6} {backward:11} {products:10}")

# %%
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
ends = np.cumsum([(0, *cost) for cost in costs.values()], axis=1).T
kinds = ("evaluations, forward", "evaluations, backward", "products, backward")
for start, end, kind in zip(ends, ends[1:], kinds):
    axis.barh(list(costs), end - start, left=start, label=kind)
axis.invert_yaxis()
axis.legend()
plt.show()

# %% [markdown]
# The forward cost depends on the solver. The backward cost is the same for both
# equilibria. For the neural ODE it grows with the time. An equilibrium keeps one state
# in memory, a neural ODE some of the states on its path.
#
# ## Which one?
#
# * A discrete solver, where it converges: it needs the fewest evaluations.
# * `inn.SteadyState`, where the cell is stable as a flow but not as an iteration.
# * `inn.NeuralODE`, where time and the states on the way mean something.
