import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._adjoint.implicit import ImplicitAdjoint
from ..._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork
from ..._internal.types import Solver
from ..._solution import EquilibriumSolution
from ..._solver.anderson import AndersonAcceleration
from ...nn import initialise, VariationalDropout, weight_norm
from .._config import check_config
from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .attention import distance_embedding
from .cell import TransformerCell
from .config import TransformerConfig
from .segment import Memory, Segment


def _zero_state(x: Segment) -> Float[Array, "query width"]:
    return jnp.zeros((x.injection.shape[0], x.memory.z.shape[1]), x.memory.z.dtype)


class DEQTransformer(eqx.Module):
    """A language model of infinitely many equal transformer layers, with a memory.

    It sees one segment of one sequence at a time, and returns the memory for the next:

    ```python
    model = eqx.filter_jit(DEQTransformer)(TransformerConfig(vocab_size=27), key=key)
    memory = model.empty_memory()
    (log_probs, solution), memory = model(tokens, memory, key=key)
    loss = -jnp.mean(jnp.take_along_axis(log_probs, targets[:, None], axis=1))
    ```

    A batch is one `jax.vmap`, with a memory and a key for each sequence. Use
    `equinox.nn.inference_mode` to evaluate.

    An equilibrium is causal. A solve is not, as it treats the segment as one system: by
    the residual that is left, a position sees the later ones. Before you report a
    perplexity, make the solver's tolerance so small that it is below the last digit;
    the [tutorial](../tutorials/language_model.py) measures it. A model that is unrolled
    by [`implicitnets.set_fixed_depth`][], or that reads one position at a time, sees
    nothing.

    Bai et al., *Deep Equilibrium Models*, 2019. All weights start as there, small,
    but for the layer that injects the input: it learns faster from larger ones.

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
        check_config(self, config, TransformerConfig)
        embedding_key, inject_key, cell_key, softmax_key = jr.split(key, 4)
        cell = TransformerCell(config, key=cell_key)
        if config.normalise_weights:
            cell = weight_norm(cell, eqx.nn.Linear)
        projections = 3 * config.num_heads * config.head_width
        self.embedding = AdaptiveEmbedding(config, key=embedding_key)
        self.embedding_dropout = VariationalDropout(config.dropout, shared_axes=0)
        layer = eqx.nn.Linear(config.width, projections, key=inject_key)
        self.inject_layer = initialise(layer, key=inject_key)
        self.deq = DeepEquilibriumNetwork(
            cell, solver, zero_state=_zero_state, adjoint=adjoint, max_steps=max_steps
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
        - `memory`: the memory of the segments before.
        - `key`: for dropout.

        **Returns:**

        The equilibrium layer's input.
        """
        keys = (None,) * 2 if key is None else jr.split(key)
        embeddings = jax.vmap(self.embedding)(tokens)
        embeddings = self.embedding_dropout(embeddings, key=keys[0])
        num_keys = memory.z.shape[0] + tokens.shape[0]
        distance = distance_embedding(num_keys, self.config.width, embeddings.dtype)
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
        - `memory`: the memory of the segments before.
        - `key`: for dropout.

        **Returns:**

        `((log_probs, solution), memory)`.
        """
        keys = (None,) * 3 if key is None else jr.split(key, 3)
        x = self.inject(tokens, memory, key=keys[0])
        solution = self.deq.solve(x, key=keys[1])
        log_probs = self.read_out(solution.z_star, key=keys[2])
        return (log_probs, solution), self.remember(x, solution.z_star)
