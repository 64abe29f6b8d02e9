from ._model import AbstractModel as AbstractModel
from .causal_transformer import (
    CausalTransformerConfig as CausalTransformerConfig,
    CausalTransformerDEQ as CausalTransformerDEQ,
)
from .mdeq.config import MDEQConfig as MDEQConfig
from .mdeq.model import MDEQ as MDEQ, MDEQSegmenter as MDEQSegmenter
from .resnet import ResNetConfig as ResNetConfig, ResNetDEQ as ResNetDEQ
from .tanh import TanhConfig as TanhConfig, TanhDEQ as TanhDEQ
from .transformer.config import TransformerConfig as TransformerConfig
from .transformer.model import DEQTransformer as DEQTransformer
from .transformer.segment import Memory as Memory, Segment as Segment
