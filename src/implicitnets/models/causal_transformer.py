import dataclasses

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._adjoint.implicit import ImplicitAdjoint
from .._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork
from .._internal.checks import check_number, check_value, FRACTION
from .._internal.types import Solver
from .._solver.broyden import Broyden
from ..nn import VariationalDropout
from ._config import check_config, check_sizes
from ._model import AbstractModel


@dataclasses.dataclass(frozen=True)
class CausalTransformerConfig:
    """The sizes of a [`implicitnets.models.CausalTransformerDEQ`][].

    The defaults are those of deq-jax.

    **Raises:**

    `ValueError` for sizes that do not go together.
    """

    vocab_size: int = 32_000
    """The number of tokens."""
    length: int = 128
    """The greatest number of positions."""
    width: int = 256
    """How wide the state is at each position."""
    num_heads: int = 4
    """How many heads the attention has."""
    dropout: float = 0.1
    """The probability with which entries are dropped."""

    def __post_init__(self):
        check_sizes(self, "vocab_size", "length", "width", "num_heads")
        check_number(self, "dropout", self.dropout, FRACTION)
        check_value(
            self,
            "num_heads",
            self.num_heads,
            self.width % self.num_heads == 0,
            f"a divisor of the width {self.width}",
        )


class CausalTransformerCell(eqx.Module):
    """One layer of a transformer that adds its input to its state first."""

    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    feed_forward_norm: eqx.nn.LayerNorm
    feed_forward: eqx.nn.MLP
    out_norm: eqx.nn.LayerNorm
    dropout: VariationalDropout

    def __init__(self, config: CausalTransformerConfig, *, key: PRNGKeyArray):
        attention_key, feed_forward_key = jr.split(key)
        width = config.width
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(
            config.num_heads, width, key=attention_key
        )
        self.feed_forward_norm = eqx.nn.LayerNorm(width)
        self.feed_forward = eqx.nn.MLP(
            width, width, 4 * width, 1, activation=jax.nn.gelu, key=feed_forward_key
        )
        self.out_norm = eqx.nn.LayerNorm(width)
        self.dropout = VariationalDropout(config.dropout)

    def __call__(
        self,
        z: Float[Array, "position width"],
        x: Float[Array, "position width"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "position width"]:
        """The next state."""
        attention_key, feed_forward_key = (None, None) if key is None else jr.split(key)
        length = z.shape[0]
        causal = jnp.tril(jnp.ones((length, length), bool))
        z = z + x
        y = jax.vmap(self.attention_norm)(z)
        y = self.attention(y, y, y, mask=causal)
        z = z + self.dropout(y, key=attention_key)
        y = jax.vmap(self.feed_forward_norm)(z)
        y = jax.vmap(self.feed_forward)(y)
        z = z + self.dropout(y, key=feed_forward_key)
        return jax.vmap(self.out_norm)(z)


class CausalTransformerDEQ(AbstractModel):
    """A small language model: a transformer layer at equilibrium, without a memory.

    The model of the deq-jax library, but for its embeddings, which are the square root
    of the width times as large at first; [`implicitnets.models.DEQTransformer`][] is
    the full model, and says how causal a solve is. The logits of a sequence are those
    of the token after each position. There are no statistics, so the `state` is empty.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    embedding: eqx.nn.Embedding
    positions: Float[Array, "position width"]
    deq: AbstractDeepEquilibriumNetwork
    head: eqx.nn.Linear

    def __init__(
        self,
        config: CausalTransformerConfig,
        solver: Solver | dfx.AbstractSolver = Broyden(rtol=1e-3, atol=1e-6),
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 30,
        key: PRNGKeyArray,
    ):
        check_config(self, config, CausalTransformerConfig)
        embedding_key, position_key, cell_key, head_key = jr.split(key, 4)
        width = config.width
        # Next to small embeddings the cell sees hardly anything but its state, and does
        # not contract.
        draw = jax.nn.initializers.truncated_normal(0.02 * width**0.5)
        embeddings = draw(embedding_key, (config.vocab_size, width))
        self.embedding = eqx.nn.Embedding(weight=embeddings)
        self.positions = draw(position_key, (config.length, width))
        self.deq = DeepEquilibriumNetwork(
            CausalTransformerCell(config, key=cell_key),
            solver,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        self.head = eqx.nn.Linear(width, config.vocab_size, key=head_key)

    def inject(
        self, x: Int[Array, " position"], state: eqx.nn.State
    ) -> tuple[Float[Array, "position width"], eqx.nn.State]:
        length, longest = len(x), len(self.positions)
        check_value(
            self, "x", length, length <= longest, f"at most {longest} tokens long"
        )
        return jax.vmap(self.embedding)(x) + self.positions[:length], state

    def read_out(
        self, z: Float[Array, "position width"], state: eqx.nn.State
    ) -> tuple[Float[Array, "position token"], eqx.nn.State]:
        return jax.vmap(self.head)(z), state
