import dataclasses
import itertools

from ..._internal.checks import check_flag, check_number, check_value, FRACTION
from .._config import check_sizes, check_tuple


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a [`implicitnets.models.DEQTransformer`][].

    **Raises:**

    `ValueError` for sizes that do not go together.
    """

    vocab_size: int
    """The number of tokens, which are ordered from the most frequent to the rarest."""
    cutoffs: tuple[int, ...] = ()
    """Where each cluster of tokens ends, except the last one. The embeddings of a
    cluster are a quarter as wide as those of the one before."""
    width: int = 128
    """How wide the state is at each position."""
    num_heads: int = 4
    """How many heads the attention has."""
    head_width: int = 32
    """How wide each head of the attention is."""
    inner_width: int = 512
    """How wide the feed-forward layer is inside."""
    memory_length: int = 128
    """How many positions of earlier segments the attention sees."""
    local_size: int = 1000
    """How many positions back the attention sees at all."""
    dropout: float = 0.05
    """The probability with which features are dropped."""
    attention_dropout: float = 0.0
    """The probability with which weights of the attention are dropped."""
    pre_norm: bool = False
    """Whether layer normalisation stands before attention and feed-forward layer
    instead of behind them."""
    normalise_weights: bool = True
    """Whether the cell has weight normalisation."""

    def __post_init__(self):
        check_sizes(self, "vocab_size", "width", "num_heads", "head_width")
        check_sizes(self, "inner_width", "local_size")
        check_sizes(self, "memory_length", least=0)
        for name in ("dropout", "attention_dropout"):
            check_number(self, name, getattr(self, name), FRACTION)
        for name in ("pre_norm", "normalise_weights"):
            check_flag(self, name, getattr(self, name))
        increasing = (
            f"positive, increasing and below the vocabulary's size {self.vocab_size}"
        )
        check_tuple(self, "cutoffs", increasing)
        ends = (0, *self.cutoffs, self.vocab_size)
        check_value(
            self,
            "cutoffs",
            self.cutoffs,
            all(a < b for a, b in itertools.pairwise(ends)),
            increasing,
        )
        # The embedding of a distance is as many sines as cosines; the last cluster's
        # embeddings have at least one feature.
        narrowest = 4 ** len(self.cutoffs)
        check_value(
            self,
            "width",
            self.width,
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
        """`wikitext103`, for training with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(
            cls.wikitext103(),
            memory_length=300,
            dropout=0.06,
            attention_dropout=0.01,
        )

    @classmethod
    def wikitext103_pre_norm(cls) -> "TransformerConfig":
        """`wikitext103_regularised` with layer normalisation in front."""
        return dataclasses.replace(cls.wikitext103_regularised(), pre_norm=True)
