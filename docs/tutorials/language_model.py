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
# # A DEQ language model
#
# A transformer whose layers are all the same is a deep equilibrium network: instead of
# stacking the layer, solve for the state that it no longer changes ([Bai et al.,
# 2019](https://arxiv.org/abs/1909.01377)). `inn.models.DEQTransformer` is that model,
# with the relative attention and the memory of Transformer-XL. Here it learns to
# continue a text, character by character.
#
# The text comes with Python: it is the part of the language reference that `help()`
# shows.

# %%
import collections
import pydoc_data.topics

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import implicitnets as inn


text = " ".join(pydoc_data.topics.topics.values()).lower()
text = " ".join(text.encode("ascii", "ignore").decode().split())
# The most frequent characters come first, as the model expects.
alphabet = [character for character, _ in collections.Counter(text).most_common()]
numbers = {character: number for number, character in enumerate(alphabet)}
tokens = np.array([numbers[character] for character in text], np.int32)
print(f"{len(tokens):,} characters, {len(alphabet)} of them different")
print(text[:70])

# %% [markdown]
# ## Segments
#
# The text is cut into 8 streams, and each stream into segments of 64 characters. A
# training step takes one segment of every stream, and the next step the next segments.
# The end of each stream is kept for the test.

# %%
num_streams, length, num_test = 8, 64, 10


def cut(tokens):
    """Into segments, of shape `(segment, stream, position)`."""
    return jnp.asarray(tokens.reshape(num_streams, -1, length).swapaxes(0, 1))


size = (len(tokens) - 1) // (num_streams * length) * num_streams * length
inputs, targets = cut(tokens[:size]), cut(tokens[1 : size + 1])
print(f"{len(inputs)} segments a stream")

# %% [markdown]
# ## The model and its memory
#
# A call takes one segment and a memory, and returns the memory for the next segment.
# The memory holds equilibria at earlier positions. Attention reads them like the
# segment itself, so they are not solved for again. The gradient treats them as
# constants.

# %%
config = inn.models.TransformerConfig(
    vocab_size=len(alphabet),
    width=64,
    num_heads=4,
    head_width=16,
    inner_width=128,
    memory_length=64,
    dropout=0.0,
)
model = eqx.filter_jit(inn.models.DEQTransformer)(
    config,
    inn.AndersonAcceleration(rtol=1e-2, atol=0.0),
    adjoint=inn.PhantomAdjoint(3),
    key=jr.key(0),
)
empty = jax.tree.map(lambda x: jnp.stack([x] * num_streams), model.empty_memory())


def loss_fn(model, x, y, memory):
    (log_probs, solution), memory = jax.vmap(model)(x, memory)
    loss = -jnp.mean(jnp.take_along_axis(log_probs, y[..., None], axis=-1))
    return loss, (memory, jnp.mean(solution.stats["nfe"]))


# %% [markdown]
# ## The training
#
# The first 150 steps unroll the cell to a fixed depth, which is cheap. The rest solve
# for the equilibrium.


# %%
optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))


@eqx.filter_jit
def train_step(model, state, x, y, memory):
    loss = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (value, (memory, evaluations)), gradient = loss(model, x, y, memory)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, memory, value, evaluations


state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
losses, evaluations = [], []
memory = empty
model = inn.set_fixed_depth(model, 3)
num_steps, num_unrolled = 200, 150
for step in range(num_steps):
    if step == num_unrolled:
        model = inn.set_fixed_depth(model, 0)
    model, state, memory, loss, nfe = train_step(
        model, state, inputs[step], targets[step], memory
    )
    losses.append(loss)
    evaluations.append(nfe)
for first in (0, num_unrolled - 10, num_steps - 10):
    loss, nfe = np.mean(losses[first:][:10]), np.mean(evaluations[first:][:10])
    print(f"from step {first:3}: {loss:.2f} nats a character, {nfe:4.1f} evaluations")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, values, name in zip(axes, (losses, evaluations), ("loss", "evaluations")):
    axis.plot(values)
    axis.axvline(num_unrolled, color="grey", linestyle="--")
    axis.set(xlabel="step", title=name)
plt.show()

# %% [markdown]
# At the dashed line the model switches from three applications of its cell to its
# equilibrium.
#
# ## What a position sees of the future
#
# The attention is causal, and so is the equilibrium: no position depends on later ones.
# But a solver treats the segment as one system. Its steps, and the residual that they
# leave, depend on all positions. So each position sees a little of the characters that
# it has to predict. Here the second half of every segment changes, and the
# log-probabilities of the first half should not:


# %%
@eqx.filter_jit
def read(model, x, rtol):
    model = eqx.tree_at(
        lambda model: (model.deq.solver.rtol, model.deq.max_steps), model, (rtol, 100)
    )
    (log_probs, _), _ = jax.vmap(model)(x, empty)
    return jnp.take_along_axis(log_probs[:, :-1], x[:, 1:, None], axis=-1)[..., 0]


half = length // 2
x = inputs[-1]
changed = x.at[:, half:].set(inputs[-2][:, half:])
for rtol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    # An array, so that all share one compiled program.
    rtol = jnp.array(rtol)
    difference = read(model, x, rtol) - read(model, changed, rtol)
    leak = jnp.max(jnp.abs(difference[:, : half - 1]))
    print(f"rtol {rtol:.0e}: {leak:.0e} nats")

# %% [markdown]
# It falls with the tolerance. So evaluate with a tolerance at which it is below the
# last digit that you report, and with enough steps to get there. There are other ways,
# too: see [Questions](../../faq/).

# %%
exact = eqx.tree_at(
    lambda model: (model.deq.solver.rtol, model.deq.max_steps), model, (1e-4, 100)
)

# %% [markdown]
# ## What the memory is worth
#
# The loss on unseen text, with the memory passed on, and with an empty memory for every
# segment:


# %%
@eqx.filter_jit
def evaluate(model, x, y, carried):
    def advance(memory, segment):
        (log_probs, _), new = jax.vmap(model)(segment[0], memory)
        found = jnp.take_along_axis(log_probs, segment[1][..., None], axis=-1)[..., 0]
        memory = jax.tree.map(lambda a, b: jnp.where(carried, a, b), new, memory)
        return memory, -jnp.mean(found, axis=0)

    return jax.lax.scan(advance, empty, (x, y))[1]


by_position = {}
for name, carried in (("carried", True), ("empty", False)):
    # An array, so that both share one compiled program.
    carried = jnp.array(carried)
    found = evaluate(exact, inputs[-num_test:], targets[-num_test:], carried)
    by_position[name] = jnp.mean(found[1:], axis=0)
    print(f"memory {name:7}: {jnp.mean(by_position[name]):.3f} nats a character")

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, values in by_position.items():
    axis.plot(values[: length // 2], ".-", label=name)
axis.set(xlabel="position in the segment", ylabel="loss, nats")
axis.legend(title="memory")
plt.show()

# %% [markdown]
# The memory helps most at the start of a segment, where the model has little else to go
# by.
#
# ## A sample
#
# The model writes one character at a time, from a segment of one position and the
# memory:


# %%
@eqx.filter_jit
def sample(model, prompt, num_characters, temperature, key):
    _, memory = model(prompt[:-1], model.empty_memory())

    def advance(carry, key):
        token, memory = carry
        (log_probs, _), memory = model(token[None], memory)
        token = jr.categorical(key, log_probs[0] / temperature)
        return (token, memory), token

    keys = jr.split(key, num_characters)
    return jax.lax.scan(advance, (prompt[-1], memory), keys)[1]


prompt = "the following statement is "
found = sample(model, jnp.array([numbers[c] for c in prompt]), 120, 0.6, jr.key(1))
line = prompt + "".join(alphabet[number] for number in found)
for start in range(0, len(line), 70):
    print(line[start : start + 70])

# %% [markdown]
# A few hundred steps of so small a model give short words and no sense.
# `inn.models.TransformerConfig.wikitext103()` and its siblings are the published sizes,
# and `python -m benchmarks.training transformer --data-dir book.txt` trains on any
# text, with checkpoints.
