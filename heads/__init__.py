"""Class-sharded margin heads: the gate applied to classes."""

from heads.adaptive import AdaFace, MagFace
from heads.gates import sampled
from heads.head import ShardedMarginHead
from heads.margin import Margin
from heads.optimizers import SGD, Adam, RowwiseAdagrad

__all__ = ["SGD", "AdaFace", "Adam", "MagFace", "Margin", "RowwiseAdagrad", "ShardedMarginHead", "sampled"]
