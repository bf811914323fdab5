"""Class-sharded margin heads: the gate applied to classes."""

from heads.head import ShardedMarginHead
from heads.margin import Margin
from heads.optimizers import SGD

__all__ = ["SGD", "Margin", "ShardedMarginHead"]
