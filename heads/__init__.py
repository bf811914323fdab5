"""Class-sharded margin heads: the gate applied to classes."""

from heads.adaptive import AdaFace, MagFace
from heads.checkpoint import CheckpointError, load_head, save_head
from heads.clusters import clustered
from heads.gates import sampled
from heads.hashed import hashed
from heads.head import ShardedMarginHead
from heads.identities import add_identities, merge_identities, remap_identities, remove_identities
from heads.margin import Margin
from heads.optimizers import SGD, Adam, RowwiseAdagrad

__all__ = [
    "SGD",
    "AdaFace",
    "Adam",
    "CheckpointError",
    "MagFace",
    "Margin",
    "RowwiseAdagrad",
    "ShardedMarginHead",
    "add_identities",
    "clustered",
    "hashed",
    "load_head",
    "merge_identities",
    "remap_identities",
    "remove_identities",
    "sampled",
    "save_head",
]
