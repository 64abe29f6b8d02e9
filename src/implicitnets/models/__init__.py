from .mdeq import (
    MDEQ as MDEQ,
    MDEQConfig as MDEQConfig,
    MDEQSegmenter as MDEQSegmenter,
)
from .resnet import ResNetConfig as ResNetConfig, ResNetDEQ as ResNetDEQ
from .tanh import TanhConfig as TanhConfig, TanhDEQ as TanhDEQ
