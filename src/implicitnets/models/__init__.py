from ._model import AbstractModel as AbstractModel
from .causal_transformer import (
    CausalTransformerConfig as CausalTransformerConfig,
    CausalTransformerDEQ as CausalTransformerDEQ,
)
from .mdeq import (
    MDEQ as MDEQ,
    MDEQConfig as MDEQConfig,
    MDEQSegmenter as MDEQSegmenter,
)
from .resnet import ResNetConfig as ResNetConfig, ResNetDEQ as ResNetDEQ
from .tanh import TanhConfig as TanhConfig, TanhDEQ as TanhDEQ
from .transformer import (
    DEQTransformer as DEQTransformer,
    Memory as Memory,
    Segment as Segment,
    TransformerConfig as TransformerConfig,
)
