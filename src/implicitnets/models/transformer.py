import dataclasses
import functools as ft
import itertools
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork, Solver
from .._internal.checks import check_hyperparameter
from .._solution import EquilibriumSolution
from .._solver.anderson import AndersonAcceleration
from ..nn import VariationalDropout, weight_norm


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a [`implicitnets.models.DEQTransformer`][].

    **Arguments:**

    - `vocab_size`: the number of tokens, ordered from the most frequent to the rarest.
    - `cutoffs`: where the clusters of tokens end but for the last one; each has
        embeddings a quarter as wide as those of the one before.
    - `width`: of the state at each position.
    - `num_heads`, `head_width`: of the attention.
    - `inner_width`: of the feed-forward layer.
    - `memory_length`: how many positions of earlier segments attention sees.
    - `local_size`: how many positions back it sees at all.
    - `dropout`: the probability with which features are dropped.
    - `attention_dropout`: the probability with which weights of attention are dropped.
    - `pre_norm`: whether layer normalisation stands before attention and feed-forward
        layer instead of behind them.
    - `normalise_weights`: whether the cell has weight normalisation.

    **Raises:**

    `ValueError` for sizes that do not go together.
    """

    vocab_size: int
    cutoffs: tuple[int, ...] = ()
    width: int = 128
    num_heads: int = 4
    head_width: int = 32
    inner_width: int = 512
    memory_length: int = 128
    local_size: int = 1000
    dropout: float = 0.05
    attention_dropout: float = 0.0
    pre_norm: bool = False
    normalise_weights: bool = True

    def __post_init__(self):
        check = ft.partial(check_hyperparameter, self)
        for name in (
            "vocab_size",
            "num_heads",
            "head_width",
            "inner_width",
            "local_size",
        ):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("memory_length", self.memory_length >= 0, "at least 0")
        ends = (0, *self.cutoffs, self.vocab_size)
        check(
            "cutoffs",
            all(a < b for a, b in itertools.pairwise(ends)),
            f"positive, increasing and below the vocabulary's size {self.vocab_size}",
        )
        # The embedding of a distance is as many sines as cosines; the last cluster's
        # embeddings have at least one feature.
        narrowest = 4 ** len(self.cutoffs)
        check(
            "width",
            self.width % 2 == 0 and self.width >= max(2, narrowest),
            f"even, and at least {max(2, narrowest)}",
        )

    @classmethod
    def wikitext103(cls) -> "TransformerConfig":
        """The published model of WikiText-103; its cell has 69,700,800 parameters.

        Weight normalisation adds the 52,200 lengths of the rows of its weights.
        """
        return cls(
            vocab_size=267_735,
            cutoffs=(20_000, 40_000, 200_000),
            width=700,
            num_heads=10,
            head_width=70,
            inner_width=48_000,
            memory_length=150,
        )

    @classmethod
    def wikitext103_regularised(cls) -> "TransformerConfig":
        """That to train with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(
            cls.wikitext103(),
            memory_length=300,
            dropout=0.06,
            attention_dropout=0.01,
        )

    @classmethod
    def wikitext103_pre_norm(cls) -> "TransformerConfig":
        """That to train with the penalty, with layer normalisation in front."""
        return dataclasses.replace(cls.wikitext103_regularised(), pre_norm=True)


class Memory(eqx.Module):
    """What a segment sees of those before it.

    As long from the start as it ever gets, so that a step is compiled once; what is not
    there yet is masked.

    **Attributes:**

    - `z`: equilibria at earlier positions.
    - `injection`: what was injected there.
    - `num_positions`: how many of the last positions are there.
    """

    z: Float[Array, "memory width"]
    injection: Float[Array, "memory projections"]
    num_positions: Int[Array, ""]


class Segment(eqx.Module):
    """What the cell sees besides its state.

    **Attributes:**

    - `memory`: of the segments before.
    - `injection`: at the positions of this one, into queries, keys and values.
    - `distance`: the embedding of how far back a key is, from the farthest to zero.
    """

    memory: Memory
    injection: Float[Array, "query projections"]
    distance: Float[Array, "key width"]


def _linear(in_size, out_size, *, use_bias=False, key):
    layer = eqx.nn.Linear(in_size, out_size, use_bias, key=key)
    weight = 0.01 * jr.normal(key, layer.weight.shape, layer.weight.dtype)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    if use_bias:
        layer = eqx.tree_at(lambda layer: layer.bias, layer, jnp.zeros(out_size))
    return layer


def _layer_norm(x):
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5)


class RelativeAttention(eqx.Module):
    """Attention to the segment and its memory, by content and by distance.

    Dai et al., *Transformer-XL: Attentive Language Models beyond a Fixed-Length
    Context*, 2019, section 3.3.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
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
        self.project = _linear(config.width, 3 * inner, key=keys[0])
        self.project_distance = _linear(config.width, inner, key=keys[1])
        self.content_bias = 0.01 * jr.normal(keys[2], shape)
        self.distance_bias = 0.01 * jr.normal(keys[3], shape)
        self.dropout = VariationalDropout(config.attention_dropout)
        self.out = _linear(inner, config.width, use_bias=True, key=keys[4])
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

    def _visible(self, x, num_keys) -> Bool[Array, "1 query key"]:
        memory_length = num_keys - x.injection.shape[0]
        query = jnp.arange(memory_length, num_keys)[:, None]
        key = jnp.arange(num_keys)[None, :]
        distance = query - key
        is_there = key >= memory_length - x.memory.num_positions
        return ((distance >= 0) & (distance < self.local_size) & is_there)[None]


def _scores(queries, keys):
    return jnp.einsum("qhf,khf->hqk", queries, keys)


def _shift(scores: Float[Array, "head query key"]) -> Float[Array, "head query key"]:
    """From scores by distance to scores by key: row `i` from the end moves by `i`.

    What comes in from the row below is ahead of the query and so not visible.
    """
    num_heads, num_queries, num_keys = scores.shape
    scores = jnp.pad(scores, ((0, 0), (0, 0), (1, 0)))
    scores = scores.reshape(num_heads, num_keys + 1, num_queries)[:, 1:]
    return scores.reshape(num_heads, num_queries, num_keys)


class TransformerCell(eqx.Module):
    """One layer of a transformer, the input of which is injected into its attention.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
    """

    attention: RelativeAttention
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    dropout: VariationalDropout
    pre_norm: bool = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        attention_key, expand_key, contract_key = jr.split(key, 3)
        width, inner = config.width, config.inner_width
        self.attention = RelativeAttention(config, key=attention_key)
        self.expand = _linear(width, inner, use_bias=True, key=expand_key)
        self.contract = _linear(inner, width, use_bias=True, key=contract_key)
        self.dropout = VariationalDropout(config.dropout, shared_axes=0)
        self.pre_norm = config.pre_norm

    def __call__(
        self,
        z: Float[Array, "query width"],
        x: Segment,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "query width"]:
        """The next state."""
        keys = (None,) * 4 if key is None else jr.split(key, 4)
        all_z = jnp.concatenate([x.memory.z, z])
        if self.pre_norm:
            all_z = _layer_norm(all_z)
        y = z + self.dropout(self.attention(all_z, x, key=keys[0]), key=keys[1])
        # The residual connection around the feed-forward layer starts behind this
        # normalisation in both variants.
        y = _layer_norm(y)
        inner = jax.nn.relu(jax.vmap(self.expand)(y))
        inner = self.dropout(inner, key=keys[2])
        y = y + self.dropout(jax.vmap(self.contract)(inner), key=keys[3])
        return y if self.pre_norm else _layer_norm(y)


class AdaptiveEmbedding(eqx.Module):
    """Embeddings that are narrower for rarer tokens.

    Baevski and Auli, *Adaptive Input Representations for Neural Language Modeling*,
    2019.

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
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
            projections.append(_linear(width, config.width, key=projection_key))
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

    **Arguments:**

    - `config`: the sizes.
    - `key`: for the weights. Keyword only argument.
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
            self.projection = _linear(width, width, key=projection_key)
            self.clusters = _linear(width, num_clusters, use_bias=True, key=cluster_key)

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


def _distance_embedding(num_keys, width, dtype):
    """Sines and cosines of the distances from `num_keys - 1` down to zero."""
    frequencies = 10_000 ** -(jnp.arange(0, width, 2, dtype=dtype) / width)
    distances = jnp.arange(num_keys - 1, -1, -1, dtype=dtype)
    angles = distances[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _zero_state(x):
    return jnp.zeros((x.injection.shape[0], x.memory.z.shape[1]), x.memory.z.dtype)


class DEQTransformer(eqx.Module):
    """A language model of infinitely many equal transformer layers, with a memory.

    Sees one segment of one sequence at a time, and hands on the memory:

    ```python
    model = eqx.filter_jit(DEQTransformer)(TransformerConfig(vocab_size=27), key=key)
    memory = model.empty_memory()
    (log_probs, solution), memory = model(tokens, memory, key=key)
    loss = -jnp.mean(jnp.take_along_axis(log_probs, targets[:, None], axis=1))
    ```

    A batch is one `jax.vmap`, with a memory and a key for each sequence. Use
    `equinox.nn.inference_mode` to evaluate.

    Bai et al., *Deep Equilibrium Models*, 2019.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    embedding: AdaptiveEmbedding
    embedding_dropout: VariationalDropout
    inject_layer: eqx.nn.Linear
    deq: AbstractDeepEquilibriumNetwork
    softmax: AdaptiveSoftmax
    config: TransformerConfig = eqx.field(static=True)

    def __init__(
        self,
        config: TransformerConfig,
        solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-3, 1e-6),
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 30,
        key: PRNGKeyArray,
    ):
        embedding_key, inject_key, cell_key, softmax_key = jr.split(key, 4)
        cell = TransformerCell(config, key=cell_key)
        if config.normalise_weights:
            cell = weight_norm(cell, eqx.nn.Linear)
        projections = 3 * config.num_heads * config.head_width
        self.embedding = AdaptiveEmbedding(config, key=embedding_key)
        self.embedding_dropout = VariationalDropout(config.dropout, shared_axes=0)
        self.inject_layer = _linear(
            config.width, projections, use_bias=True, key=inject_key
        )
        self.deq = DeepEquilibriumNetwork(
            cell, solver, init=_zero_state, adjoint=adjoint, max_steps=max_steps
        )
        self.softmax = AdaptiveSoftmax(config, key=softmax_key)
        self.config = config

    def empty_memory(self) -> Memory:
        """The memory at the beginning of a sequence.

        **Returns:**

        A memory.
        """
        length, width = self.config.memory_length, self.config.width
        dtype = self.embedding.tables[0].dtype
        projections = 3 * self.config.num_heads * self.config.head_width
        return Memory(
            z=jnp.zeros((length, width), dtype),
            injection=jnp.zeros((length, projections), dtype),
            num_positions=jnp.array(0),
        )

    def inject(
        self,
        tokens: Int[Array, " query"],
        memory: Memory,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Segment:
        """What the cell sees of a segment.

        **Arguments:**

        - `tokens`: the segment.
        - `memory`: of the segments before.
        - `key`: for dropout.

        **Returns:**

        The equilibrium layer's input.
        """
        keys = (None,) * 2 if key is None else jr.split(key)
        embeddings = jax.vmap(self.embedding)(tokens)
        embeddings = self.embedding_dropout(embeddings, key=keys[0])
        num_keys = memory.z.shape[0] + tokens.shape[0]
        distance = _distance_embedding(num_keys, self.config.width, embeddings.dtype)
        return Segment(
            memory=memory,
            injection=jax.vmap(self.inject_layer)(embeddings),
            distance=self.embedding_dropout(distance, key=keys[1]),
        )

    def read_out(
        self, z: Float[Array, "query width"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "query token"]:
        """The logarithms of the probabilities of the tokens that follow.

        **Arguments:**

        - `z`: the equilibrium.
        - `key`: for dropout.

        **Returns:**

        A row for every position, of the token after it.
        """
        z = self.embedding_dropout(z, key=key)
        return jax.vmap(lambda z: self.softmax(z, self.embedding))(z)

    def remember(self, x: Segment, z: Float[Array, "query width"]) -> Memory:
        """The memory with a segment's equilibrium, detached.

        **Arguments:**

        - `x`: what the cell saw of the segment.
        - `z`: the equilibrium.

        **Returns:**

        The memory for the next segment.
        """
        length = self.config.memory_length

        def append(old, new):
            both = jnp.concatenate([old, lax.stop_gradient(new)])
            return both[both.shape[0] - length :]

        num_positions = x.memory.num_positions + z.shape[0]
        return Memory(
            z=append(x.memory.z, z),
            injection=append(x.memory.injection, x.injection),
            num_positions=jnp.minimum(num_positions, length),
        )

    def __call__(
        self,
        tokens: Int[Array, " query"],
        memory: Memory,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        tuple[Float[Array, "query token"], EquilibriumSolution],
        Memory,
    ]:
        """The log-probabilities after each position, the solve, and the new memory.

        **Arguments:**

        - `tokens`: the segment.
        - `memory`: of the segments before.
        - `key`: for dropout.

        **Returns:**

        `((log_probs, solution), memory)`.
        """
        keys = (None,) * 3 if key is None else jr.split(key, 3)
        x = self.inject(tokens, memory, key=keys[0])
        solution = self.deq.solve(x, key=keys[1])
        log_probs = self.read_out(solution.z_star, key=keys[2])
        return (log_probs, solution), self.remember(x, solution.z_star)
