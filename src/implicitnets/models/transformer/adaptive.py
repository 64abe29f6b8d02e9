import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._layers import linear
from .config import TransformerConfig


class AdaptiveEmbedding(eqx.Module):
    """Embeddings that are narrower for rarer tokens.

    Baevski and Auli, *Adaptive Input Representations for Neural Language Modeling*,
    2019.
    """

    tables: tuple[Float[Array, "token feature"], ...]
    projections: tuple[eqx.nn.Linear, ...]
    starts: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        ends = (*config.cutoffs, config.vocab_size)
        self.starts = (0, *config.cutoffs)
        tables, projections = [], []
        for i, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            table_key, projection_key = jr.split(jr.fold_in(key, i))
            width = config.width // 4**i
            tables.append(0.01 * jr.normal(table_key, (end - start, width)))
            projections.append(linear(width, config.width, key=projection_key))
        self.tables = tuple(tables)
        # A single table is as wide as the state.
        self.projections = tuple(projections) if config.cutoffs else ()

    def __call__(self, token: Int[Array, ""]) -> Float[Array, " width"]:
        """The embedding of a token."""
        if not self.projections:
            (table,) = self.tables
            return math.sqrt(table.shape[1]) * table[token]
        embeddings = []
        for start, table, projection in zip(
            self.starts, self.tables, self.projections, strict=True
        ):
            row = token - start
            is_here = (row >= 0) & (row < table.shape[0])
            embedding = projection(table[jnp.clip(row, 0, table.shape[0] - 1)])
            embeddings.append(jnp.where(is_here, embedding, 0))
        embedding = sum(embeddings[1:], start=embeddings[0])
        return math.sqrt(embedding.shape[0]) * embedding


class AdaptiveSoftmax(eqx.Module):
    """Logarithms of the probabilities of tokens, with the weights of the embedding.

    The head decides between the frequent tokens and the clusters of the others, whose
    tables and projections are those of the embedding, transposed.

    Grave et al., *Efficient softmax approximation for GPUs*, 2017.
    """

    biases: tuple[Float[Array, " token"], ...]
    projection: eqx.nn.Linear | eqx.nn.Identity
    clusters: eqx.nn.Linear | None

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        projection_key, cluster_key = jr.split(key)
        ends = (0, *config.cutoffs, config.vocab_size)
        self.biases = tuple(jnp.zeros(b - a) for a, b in itertools.pairwise(ends))
        self.projection, self.clusters = eqx.nn.Identity(), None
        if config.cutoffs:
            width, num_clusters = config.width, len(config.cutoffs)
            self.projection = linear(width, width, key=projection_key)
            self.clusters = linear(width, num_clusters, use_bias=True, key=cluster_key)

    def __call__(
        self, z: Float[Array, " width"], embedding: AdaptiveEmbedding
    ) -> Float[Array, " token"]:
        """The logarithms of the probabilities of all tokens at one position."""
        hidden = self.projection(z)
        logits = embedding.tables[0] @ hidden + self.biases[0]
        if self.clusters is None:
            return jax.nn.log_softmax(logits)
        head = jax.nn.log_softmax(jnp.concatenate([logits, self.clusters(hidden)]))
        parts = [head[: logits.shape[0]]]
        for i, (table, projection, bias) in enumerate(
            zip(embedding.tables[1:], embedding.projections[1:], self.biases[1:])
        ):
            logits = table @ (z @ projection.weight) + bias
            parts.append(head[parts[0].shape[0] + i] + jax.nn.log_softmax(logits))
        return jnp.concatenate(parts)
