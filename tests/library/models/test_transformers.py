import dataclasses
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets.models import (
    CausalTransformerConfig,
    CausalTransformerDEQ,
    DEQTransformer,
    Memory,
    Segment,
    TransformerConfig,
)
from implicitnets.models.transformer.attention import (
    distance_embedding,
    RelativeAttention,
)

from ..helpers import tolerance
from ..training import cross_entropy, fit, num_parameters, over_batch


@pytest.mark.xla_defaults
def test_causal_transformer():
    """The overfitting test of deq-jax, for fewer sequences: below 0.1."""
    config = CausalTransformerConfig(100, length=29, width=32, num_heads=8)
    make = ft.partial(CausalTransformerDEQ, config)
    model, state = eqx.filter_jit(eqx.nn.make_with_state(make))(key=jr.key(0))
    tokens = jr.randint(jr.key(1), (4, 30), 0, 100)

    def loss(model, state, key):
        keys = jr.split(key, 4)
        (logits, _), state = over_batch(model, tokens[:, :-1], state, keys)
        return cross_entropy(logits, tokens[:, 1:]), state

    optimiser = optax.chain(
        optax.clip_by_global_norm(0.25), optax.adam(2e-2, b1=0.9, b2=0.99)
    )
    _, _, losses = fit(loss, model, state, optimiser, num_steps=40)
    assert losses[-1] < 0.1


def test_length_of_the_causal_transformer_is_checked():
    config = CausalTransformerConfig(5, length=3, width=4, num_heads=2)
    make = eqx.nn.make_with_state(CausalTransformerDEQ)
    model, state = eqx.filter_eval_shape(make, config, key=jr.key(0))
    with pytest.raises(ValueError, match="at most 3 tokens long; got 4"):
        eqx.filter_eval_shape(model, jnp.zeros(4, int), state)


TINY_TRANSFORMER = TransformerConfig(
    vocab_size=20,
    cutoffs=(6, 12),
    width=16,
    num_heads=2,
    head_width=4,
    inner_width=8,
    memory_length=5,
    dropout=0.0,
)


def test_number_of_parameters_of_the_transformer():
    model = eqx.filter_eval_shape(
        DEQTransformer, TransformerConfig.wikitext103(), key=jr.key(0)
    )
    lengths = 52_200
    assert num_parameters(model.deq.cell) == 69_700_800 + lengths
    assert num_parameters(model.inject_layer) == 1_472_100
    without = dataclasses.replace(
        TransformerConfig.wikitext103_pre_norm(), normalise_weights=False
    )
    model = eqx.filter_eval_shape(DEQTransformer, without, key=jr.key(0))
    assert num_parameters(model.deq.cell) == 69_700_800
    # Four tables and their projections; a bias for every token, the projection of the
    # head, and the clusters.
    embedding = (20_000 * 700 + 20_000 * 175 + 160_000 * 43 + 67_735 * 10) + 700 * (
        700 + 175 + 43 + 10
    )
    assert num_parameters(model.embedding) == embedding
    assert num_parameters(model.softmax) == 267_735 + 700 * 700 + 3 * 701


def make_transformer(**kwargs):
    config = dataclasses.replace(TINY_TRANSFORMER, **kwargs)
    solver = inn.AndersonAcceleration(*(2 * [tolerance(1e-6, 1e-10)]))
    make = ft.partial(DEQTransformer, config, solver, max_steps=100)
    model = eqx.filter_jit(make)(key=jr.key(0))

    # With weights as small as at first, nothing depends on anything much.
    def enlarge(leaf):
        return 30 * leaf if eqx.is_inexact_array(leaf) else leaf

    return eqx.tree_at(
        lambda m: (m.embedding, m.deq.cell),
        model,
        replace_fn=lambda tree: jtu.tree_map(enlarge, tree),
    )


@eqx.filter_jit
def read(model, tokens, memory):
    return model(tokens, memory)


@pytest.mark.parametrize("pre_norm", (False, True))
def test_transformer(pre_norm):
    model = make_transformer(pre_norm=pre_norm)
    tokens = jnp.array([3, 7, 19, 0, 11, 12, 5, 1])
    (log_probs, sol), memory = read(model, tokens, model.empty_memory())
    assert sol.result == optx.RESULTS.successful
    assert log_probs.shape == (8, 20)
    assert np.allclose(np.sum(np.exp(log_probs), axis=1), 1, atol=1e-5)
    assert memory.num_positions == 5
    assert np.allclose(memory.z, sol.z_star[-5:])
    close = ft.partial(np.allclose, atol=tolerance(1e-4, 1e-8))

    # A position sees nothing of what comes after it.
    (changed, _), _ = read(model, tokens.at[4].set(1), model.empty_memory())
    assert close(changed[:4], log_probs[:4])
    assert not close(changed[4], log_probs[4])

    # Equilibria that are remembered are those of the whole: in two segments as in one.
    (first, _), memory = read(model, tokens[:4], model.empty_memory())
    assert memory.num_positions == 4
    (second, _), memory = read(model, tokens[4:], memory)
    assert memory.num_positions == 5
    assert close(jnp.concatenate([first, second]), log_probs)


def test_transformer_sees_only_so_far():
    model = make_transformer(local_size=2, memory_length=0)
    tokens = jnp.array([3, 7, 19, 0, 11])
    # At equilibrium the view widens by every layer, so: one layer.
    model = inn.set_fixed_depth(model, 1)
    (log_probs, _), _ = read(model, tokens, model.empty_memory())
    (changed, _), _ = read(model, tokens.at[0].set(1), model.empty_memory())
    differs = np.any(~np.isclose(changed, log_probs, atol=1e-6), axis=1)
    assert differs.tolist() == [True, True, False, False, False]


def test_relative_attention():
    """Against Transformer-XL's formula, written out for each query and key."""
    config = dataclasses.replace(TINY_TRANSFORMER, local_size=4)
    attention = RelativeAttention(config, key=jr.key(0))
    attention = jtu.tree_map(
        lambda w: 30 * w if eqx.is_inexact_array(w) else w, attention
    )
    q, m = 3, 5
    z_key, u_key = jr.split(jr.key(1))
    z = jr.normal(z_key, (m + q, 16))
    u = jr.normal(u_key, (m + q, 24))
    distance = distance_embedding(m + q, 16, z.dtype)
    memory = Memory(z[:m], u[:m], jnp.array(2))
    out = attention(z, Segment(memory, u[m:], distance))

    def heads(x):
        return np.asarray(x, float).reshape(-1, 2, 4)

    weight = np.asarray(attention.project.weight, float)
    queries, keys, values = map(heads, np.split(np.asarray(z) @ weight.T + u, 3, 1))
    r = heads(np.asarray(distance) @ np.asarray(attention.project_distance.weight).T)
    expected = np.zeros((q, 2, 4))
    for i in range(q):
        for h in range(2):
            scores = {}
            for j in range(m + q):
                back = i + m - j
                if 0 <= back < 4 and j >= m - 2:
                    by_content = (queries[i + m, h] + attention.content_bias[h]) @ keys[
                        j, h
                    ]
                    by_distance = (queries[i + m, h] + attention.distance_bias[h]) @ r[
                        m + q - 1 - back, h
                    ]
                    scores[j] = np.exp((by_content + by_distance) / 2)
            for j, score in scores.items():
                expected[i, h] += score / sum(scores.values()) * values[j, h]
    expected = expected.reshape(q, 8) @ np.asarray(attention.out.weight).T
    expected = expected + np.asarray(attention.out.bias)
    assert np.allclose(out, expected, rtol=1e-4, atol=tolerance(1e-3, 1e-9))


@pytest.mark.one_precision
def test_training_the_transformer():
    """It learns to repeat what its memory holds, with all its dropouts."""
    config = dataclasses.replace(
        TINY_TRANSFORMER, dropout=0.05, attention_dropout=0.05, pre_norm=True
    )
    make = ft.partial(DEQTransformer, config, max_steps=8)
    model = eqx.filter_jit(make)(key=jr.key(0))
    memories = jtu.tree_map(lambda x: jnp.stack([x] * 2), model.empty_memory())
    tokens = jr.randint(jr.key(1), (2, 6), 0, 20)

    def loss(model, memories, key):
        (log_probs, _), memories = jax.vmap(model)(
            tokens[:, :-1], memories, key=jr.split(key)
        )
        targets = tokens[:, 1:, None]
        return -jnp.mean(jnp.take_along_axis(log_probs, targets, axis=2)), memories

    _, memories, losses = fit(loss, model, memories, optax.adam(1e-2), num_steps=60)
    assert np.all(memories.num_positions == 5)
    assert losses[-1] < 0.6 * losses[0]
