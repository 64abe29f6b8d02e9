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
# # Many devices, precision, checkpoints, export
#
# To JAX, a solve is a function like any other: it can be split over devices, run in
# another precision, saved and exported. This page does all four, on a CPU that pretends
# to be four devices. Without its two calls of `jax.config.update`, the code runs on
# four GPUs.

# %%
import tempfile
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import implicitnets as inn


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
print(jax.devices())

# %% [markdown]
# The model is the one of [Choose a solver](../solvers/): a dense cell with 64 units
# between two linear layers, on scikit-learn's digits.


# %%
class Cell(eqx.Module):
    hidden: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + x)


class Classifier(eqx.Module):
    stem: eqx.nn.Linear
    deq: inn.DeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(self, key, rtol=1e-4):
        keys = jr.split(key, 3)
        self.stem = eqx.nn.Linear(64, 64, key=keys[0])
        self.deq = inn.DeepEquilibriumNetwork(
            Cell(eqx.nn.Linear(64, 64, key=keys[1])),
            inn.AndersonAcceleration(rtol, atol=0.0),
        )
        self.head = eqx.nn.Linear(64, 10, key=keys[2])

    def __call__(self, x):
        return self.head(self.deq(self.stem(x)))


pixels, labels = load_digits(return_X_y=True)
pixels = np.asarray(pixels / 16, np.float32)
model = Classifier(jr.key(0))
params, static = eqx.partition(model, eqx.is_array)


def loss_fn(params, x, y):
    logits = jax.vmap(eqx.combine(params, static))(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


gradient = jax.jit(jax.grad(loss_fn))

# %% [markdown]
# ## A batch over four devices
#
# Every device gets the weights and a quarter of the batch. The code stays as it is: the
# compiler splits the solve and its gradient, and sums what the devices return.

# %%
mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
everywhere = NamedSharding(mesh, PartitionSpec())
split = NamedSharding(mesh, PartitionSpec("batch"))

batch = pixels[:64], labels[:64]
alone = gradient(*jax.device_put((params, *batch), jax.devices()[0]))
together = gradient(jax.device_put(params, everywhere), *jax.device_put(batch, split))


def relative_difference(found, wanted):
    found, wanted = jax.device_get((found, wanted))
    difference = optx.two_norm(jax.tree.map(np.subtract, found, wanted))
    return f"{difference / optx.two_norm(wanted):.0e}"


print("relative difference to one device:", relative_difference(together, alone))

# %% [markdown]
# That mesh has `Auto` axes. `jax.make_mesh` makes `Explicit` ones unless it is told
# otherwise, and then the type of every array says how it is divided. Set such a mesh
# with `jax.set_mesh`, and put the weights on it too.

# %%
explicit = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    weights = jax.device_put(params, PartitionSpec())
    pieces = jax.device_put(batch, PartitionSpec("batch"))
    together = gradient(weights, *pieces)
print("relative difference to one device:", relative_difference(together, alone))

# %% [markdown]
# The solvers, adjoints and linear solvers of this library work there under `jax.vmap`.
# Of the other libraries, `optx.Newton`, `optx.LevenbergMarquardt`,
# `optx.ImplicitAdjoint`, `lx.GMRES`, implicit ODE solvers and `inn.NeuralODE` do not,
# nor does a solve of one state that is itself divided. For these, make the axes
# automatic around the batch. Every array goes in as an argument:
# `jax.sharding.auto_axes(batch_fn, out_sharding=PartitionSpec("batch"))(params, x)`.
#
# The training step stays as it is, too.

# %%
optimiser = optax.adam(1e-3)


@jax.jit
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = optimiser.update(grads, state)
    return optax.apply_updates(params, updates), state, loss


def train(start, steps):
    params, state = start
    losses = []
    for step in steps:
        rows = np.random.default_rng(step).integers(0, 1500, 64)
        x, y = jax.device_put((pixels[rows], labels[rows]), split)
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    return params, state, losses


start = jax.device_put((params, optimiser.init(params)), everywhere)
params, state, before = train(start, range(100))
print(f"loss {before[0]:.3f} at first, {before[-1]:.3f} after 100 steps")

# %% [markdown]
# ## Who waits for whom
#
# Under `vmap` a converged example stays as it is, and the loop goes on for the others.
# Split by the compiler, that is one loop on all devices: in every step they ask each
# other whether any example has not converged. With `jax.shard_map` every device runs
# its own loop, and they do not talk before the end. The results agree up to rounding.


# %%
def num_steps(params, x):
    model = eqx.combine(params, static)
    return jax.vmap(lambda x: model.deq.solve(model.stem(x)).stats["num_steps"])(x)


each_for_itself = jax.shard_map(
    num_steps,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("batch")),
    out_specs=PartitionSpec("batch"),
)
x = jax.device_put(pixels[1500:1564], split)
steps = jax.jit(num_steps)(params, x)
same = jnp.all(steps == jax.jit(each_for_itself)(params, x))
print("the same numbers of steps:", bool(same))

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for shard in steps.addressable_shards:
    rows = np.arange(64)[shard.index]
    found = np.asarray(shard.data)
    bars = axis.bar(rows, found, label=f"device {shard.device.id}")
    axis.hlines(found.max(), rows[0], rows[-1], color=bars[0].get_facecolor())
axis.axhline(steps.max(), color="grey", linestyle="--")
axis.set(xlabel="example", ylabel="solver steps")
axis.legend(ncols=4, loc="lower center")
plt.show()

# %% [markdown]
# The dashed line is where the common loop ends. The lines over the bars are where the
# four separate loops end.
#
# One caution, for CPUs only. The library rewrites convolutions in loops into the one
# form that XLA runs fast on CPU. Where XLA (of jaxlib 0.10) compiles for a mesh, it
# undoes that, and a convolutional cell runs several times slower. Dense cells and GPUs
# are not affected.
#
# ## Precision
#
# A GPU keeps 10 bits of the operands of a float32 product (TensorFloat32), unless
# `jax.default_matmul_precision("highest")` asks for all 23. Other arithmetic is in
# float32, and so are the products of the solvers here. A CPU has no TensorFloat32: this
# cell rounds its operands. Seven bits are those of bfloat16.


# %%
class RoundedCell(eqx.Module):
    cell: Cell
    bits: int

    def __call__(self, z, x):
        def rounded(a):
            return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=self.bits)

        cell, z = jax.tree.map(rounded, (self.cell, z))
        return cell(z, x)


def with_cell(model, cell, rtol):
    solver = inn.AndersonAcceleration(rtol, atol=0.0)
    return eqx.tree_at(lambda m: (m.deq.cell, m.deq.solver), model, (cell, solver))


@eqx.filter_jit
def examine(model, x):
    def of_example(x):
        solution = model.deq.solve(model.stem(x))
        residual = optx.two_norm(solution.residual) / optx.two_norm(solution.z_star)
        stagnated = solution.result == optx.RESULTS.stagnation
        return residual, solution.stats["nfe"], stagnated

    return jax.vmap(of_example)(x)


trained = eqx.combine(jax.device_get(params), static)
for bits in (23, 10, 7):
    for rtol in (1e-2, 1e-4, 1e-6):
        rounded = with_cell(trained, RoundedCell(trained.deq.cell, bits), rtol)
        residual, nfe, stagnated = examine(rounded, pixels[1500:])
        print(
            f"{bits:2} bits, rtol {rtol:.0e}: nine of ten residuals below "
            f"{np.quantile(residual, 0.9):.0e}, {nfe.mean():2.0f} evaluations, "
            f"{stagnated.mean():3.0%} stagnation"
        )

# %% [markdown]
# Rounding puts a floor under the residual. A solve that is at its floor ends as
# `stagnation`, at the best iterate that it has found, and so does the default adjoint.
# It does not run to `max_steps`. Ask for a tolerance above the floor: `1e-3` for
# TensorFloat32, `1e-2` for bfloat16. Or give the cell's products more bits, and write
# `with jax.default_matmul_precision("highest"):` within the cell.
#
# ## Mixed precision
#
# The cell computes in bfloat16. The state, the solver and the trained weights stay in
# float32.


# %%
class HalfCell(eqx.Module):
    cell: Callable

    def __call__(self, z, x):
        def half(a):
            return a.astype(jnp.bfloat16)

        cell, half_z, half_x = jax.tree.map(half, (self.cell, z, x))
        return cell(half_z, half_x).astype(z.dtype)


@eqx.filter_jit
def fit(model, rows):
    params, static = eqx.partition(model, eqx.is_array)

    def step(carry, rows):
        params, state = carry
        x, y = jnp.asarray(pixels)[rows], jnp.asarray(labels)[rows]

        def loss_fn(params):
            logits = jax.vmap(eqx.combine(params, static))(x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        updates, state = optimiser.update(jax.grad(loss_fn)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), rows)
    return eqx.combine(params, static)


@eqx.filter_jit
def accuracy(model):
    found = jnp.argmax(jax.vmap(model)(pixels[1500:]), axis=1)
    return jnp.mean(found == jnp.asarray(labels)[1500:])


def gradient_memory(model):
    params, static = eqx.partition(model, eqx.is_array)

    def loss_fn(params, x):
        return jnp.sum(jax.vmap(eqx.combine(params, static))(x) ** 2)

    compiled = jax.jit(jax.grad(loss_fn)).lower(params, pixels[:1024]).compile()
    memory = compiled.memory_analysis()
    return 0.0 if memory is None else memory.temp_size_in_bytes / 1e6


rows = np.random.default_rng(0).integers(0, 1500, (2000, 64))
for name, cell in (("float32", model.deq.cell), ("bfloat16", HalfCell(model.deq.cell))):
    network = with_cell(model, cell, rtol=1e-2)
    unrolled = inn.set_fixed_depth(network, 8)
    checkpointed = inn.set_fixed_depth(network, 8, checkpoint=True)
    print(
        f"{name:8} cell: accuracy {accuracy(fit(network, rows)):.1%}; memory of a "
        f"gradient {gradient_memory(network):.1f} MB, of 8 unrolled applications "
        f"{gradient_memory(unrolled):.1f} MB, with `checkpoint=True` "
        f"{gradient_memory(checkpointed):.1f} MB"
    )

# %% [markdown]
# The accuracy is the same, up to the noise of a training. TensorFloat32, float32 and a
# bfloat16 cell differ as little [on a GPU](../../gpu_report/).
#
# The memory is hardly less in bfloat16. A solve and its gradient keep states of the
# solvers, which are float32, and one evaluation of the cell. A CPU also computes
# bfloat16 in float32. Of an unrolled network `checkpoint=True` keeps the states alone.
#
# ## Checkpoints
#
# A model is a pytree. `eqx.tree_serialise_leaves` writes its leaves and those of the
# optimiser's state into a file. To read them, pass a pytree of the same structure, such
# as the start of the training. Training then goes on as if it had never stopped.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.eqx"
    eqx.tree_serialise_leaves(path, (params, state))
    restored = eqx.tree_deserialise_leaves(path, start)

_, _, onwards = train((params, state), range(100, 150))
_, _, resumed = train(jax.device_put(restored, everywhere), range(100, 150))
print("the same losses to the last bit:", onwards == resumed)

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.semilogy(range(100), before, label="before the checkpoint")
axis.semilogy(range(100, 150), onwards, linewidth=4, alpha=0.4, label="went on")
axis.semilogy(range(100, 150), resumed, label="restored")
axis.set(xlabel="step", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# Those leaves were arrays only. In a whole model, the tolerances of the solver are
# leaves too. So the restored model has the saved tolerances, whatever the model that it
# was read into has.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.eqx"
    eqx.tree_serialise_leaves(path, eqx.combine(params, static))
    read = eqx.tree_deserialise_leaves(path, Classifier(jr.key(1), rtol=1e-2))
print(f"saved {model.deq.solver.rtol}, read into 0.01, got {read.deq.solver.rtol}")

# %% [markdown]
# For runs that may be killed at any moment, `python -m benchmarks.training` keeps Orbax
# checkpoints. It writes them beside the training, complete or not at all, and a run
# with other settings refuses them.
#
# ## Export
#
# `jax.export` compiles a function for another machine, as far as is possible here. A
# solve and its gradient have no callback to Python, so a whole training gradient can be
# exported, here for CPU, CUDA and TPU at once.

# %%
here = jax.device_put((params, *batch), jax.devices()[0])
exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(*here)
print(exported.platforms, f"{len(exported.mlir_module_serialized) / 1e3:.0f} kB")
print("callbacks:", "callback" in exported.mlir_module())
difference = relative_difference(exported.call(*here), gradient(*here))
print("relative difference of the exported gradient:", difference)

# %% [markdown]
# `exported.serialize()` turns it into bytes, for which JAX needs the package
# `flatbuffers`. `jax.export.deserialize` turns them back into a function, on a machine
# that needs neither this library nor the model's code.
