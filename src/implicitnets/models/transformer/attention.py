import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ...nn import VariationalDropout
from .._layers import linear
from .config import TransformerConfig
from .segment import Segment


class RelativeAttention(eqx.Module):
    """Attention to the segment and its memory, by content and by distance.

    Dai et al., *Transformer-XL: Attentive Language Models beyond a Fixed-Length
    Context*, 2019, section 3.3.
    """

    project: eqx.nn.Linear
    project_distance: eqx.nn.Linear
    content_bias: Float[Array, "head feature"]
    distance_bias: Float[Array, "head feature"]
    dropout: VariationalDropout
    out: eqx.nn.Linear
    local_size: int = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, 5)
        shape = (config.num_heads, config.head_width)
        inner = config.num_heads * config.head_width
        self.project = linear(config.width, 3 * inner, key=keys[0])
        self.project_distance = linear(config.width, inner, key=keys[1])
        self.content_bias = 0.01 * jr.normal(keys[2], shape)
        self.distance_bias = 0.01 * jr.normal(keys[3], shape)
        self.dropout = VariationalDropout(config.attention_dropout)
        self.out = linear(inner, config.width, use_bias=True, key=keys[4])
        self.local_size = config.local_size

    def __call__(
        self,
        z: Float[Array, "key width"],
        x: Segment,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "query width"]:
        """What the positions of the segment gather from all positions."""
        num_queries, num_keys = x.injection.shape[0], z.shape[0]

        def heads(features):
            return features.reshape(-1, *self.content_bias.shape)

        injection = jnp.concatenate([x.memory.injection, x.injection])
        projections = jax.vmap(self.project)(z) + injection
        queries, keys, values = map(heads, jnp.split(projections, 3, axis=-1))
        queries = queries[-num_queries:]
        distances = heads(jax.vmap(self.project_distance)(x.distance))

        by_content = _scores(queries + self.content_bias[None], keys)
        by_distance = _scores(queries + self.distance_bias[None], distances)
        scores = by_content + _shift(by_distance)
        visible = jnp.broadcast_to(self._visible(x, num_keys), scores.shape)
        weights = jax.nn.softmax(
            scores / math.sqrt(queries.shape[-1]), axis=-1, where=visible
        )
        weights = self.dropout(weights, key=key)
        gathered = jnp.einsum("hqk,khf->qhf", weights, values)
        return jax.vmap(self.out)(gathered.reshape(num_queries, -1))

    def _visible(self, x: Segment, num_keys: int) -> Bool[Array, "1 query key"]:
        memory_length = num_keys - x.injection.shape[0]
        query = jnp.arange(memory_length, num_keys)[:, None]
        key = jnp.arange(num_keys)[None, :]
        distance = query - key
        is_there = key >= memory_length - x.memory.num_positions
        return ((distance >= 0) & (distance < self.local_size) & is_there)[None]


def _scores(
    queries: Float[Array, "query head feature"], keys: Float[Array, "key head feature"]
) -> Float[Array, "head query key"]:
    return jnp.einsum("qhf,khf->hqk", queries, keys)


def _shift(scores: Float[Array, "head query key"]) -> Float[Array, "head query key"]:
    """From scores by distance to scores by key: row `i` from the end moves by `i`."""
    # What comes in from the row below is ahead of the query and so not visible.
    num_heads, num_queries, num_keys = scores.shape
    scores = jnp.pad(scores, ((0, 0), (0, 0), (1, 0)))
    scores = scores.reshape(num_heads, num_keys + 1, num_queries)[:, 1:]
    return scores.reshape(num_heads, num_queries, num_keys)


def distance_embedding(
    num_keys: int, width: int, dtype: Any
) -> Float[Array, "key width"]:
    """Sines and cosines of the distances from `num_keys - 1` down to zero."""
    frequencies = 10_000 ** -(jnp.arange(0, width, 2, dtype=dtype) / width)
    distances = jnp.arange(num_keys - 1, -1, -1, dtype=dtype)
    angles = distances[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
