import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ...nn import VariationalDropout
from .._layers import linear
from .attention import RelativeAttention
from .config import TransformerConfig
from .segment import Segment


def _layer_norm(x: Float[Array, "position width"]) -> Float[Array, "position width"]:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5)


class TransformerCell(eqx.Module):
    """One layer of a transformer whose input is injected into its attention."""

    attention: RelativeAttention
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    dropout: VariationalDropout
    pre_norm: bool = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        attention_key, expand_key, contract_key = jr.split(key, 3)
        width, inner = config.width, config.inner_width
        self.attention = RelativeAttention(config, key=attention_key)
        self.expand = linear(width, inner, use_bias=True, key=expand_key)
        self.contract = linear(inner, width, use_bias=True, key=contract_key)
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
