"""Scorers that are not learnt: a table by item or task, a hash of the id, a decision tree.

A fixed random subnetwork is :class:`~bigvision.gating.scorers.RandomScorer` with the task for a token and a
step that stays.

Legend: T tokens, E experts, I items, D features, d depth of a tree.
"""

import torch
from torch import Tensor, nn

from .counter import counter_bits, counter_key


def _check_ids(ids: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids are int64 [T], got {ids.dtype} {list(ids.shape)}")


class TableScorer(nn.Module):
    """Scores looked up by an id: a task, a sensor, a class, a place.

    Args:
        table: float [I, E], the scores of each item.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if table.dim() != 2 or not table.is_floating_point():
            raise ValueError(f"the table is float [I, E], got {table.dtype} {list(table.shape)}")
        self.register_buffer("table", table)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores [T, E] of ids int64 [T] in 0..I-1; a ValueError for others."""
        _check_ids(ids)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.table)):
            raise ValueError(
                f"ids must be in [0, {len(self.table)}), got {int(ids.min())} to {int(ids.max())}"
            )
        return self.table[ids]


class BucketScorer(nn.Module):
    """One expert for each id by a hash of it (Roller et al. 2021, "Hash Layers for Large Sparse Models").

    Args:
        num_experts: E.
        seed: of the hash.
    """

    def __init__(self, num_experts: int, *, seed: int = 0) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        self.num_experts, self.seed = num_experts, seed

    def forward(self, ids: Tensor) -> Tensor:
        """One-hot float32 [T, E] of ids int64 [T]; any id will do."""
        _check_ids(ids)
        words = counter_bits(counter_key(self.seed), ids, 0, 1).squeeze(1)
        # The upper 32 bits times E, again their upper 32 bits: an even spread without a remainder's bias.
        high = words.bitwise_right_shift(32).bitwise_and((1 << 32) - 1)
        bucket = (high * self.num_experts).bitwise_right_shift(32)
        return nn.functional.one_hot(bucket, self.num_experts).float()


class TreeScorer(nn.Module):
    """A binary decision tree with one expert a leaf.

    Node i asks whether x[feature[i]] > cut[i]; its children are nodes 2i + 1 (no) and 2i + 2 (yes).

    Args:
        feature: int64 [2**d - 1], the feature each node looks at, in heap order.
        cut: float [2**d - 1]; a value above goes right, others (NaN too) left.

    Raises:
        ValueError: not 2**d - 1 nodes, or arrays that differ in length.
    """

    feature: Tensor
    cut: Tensor

    def __init__(self, feature: Tensor, cut: Tensor) -> None:
        super().__init__()
        nodes = len(feature)
        if feature.dim() != 1 or feature.shape != cut.shape or nodes < 1 or (nodes + 1) & nodes:
            raise ValueError(
                f"feature and cut are [2**d - 1], got {list(feature.shape)} and {list(cut.shape)}"
            )
        self.depth = (nodes + 1).bit_length() - 1
        self.register_buffer("feature", feature.long())
        self.register_buffer("cut", cut)

    def forward(self, x: Tensor) -> Tensor:
        """One-hot float32 [T, 2**d] of the leaf that each row of x [T, D] falls into."""
        node = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for _ in range(self.depth):
            value = x.gather(1, self.feature[node][:, None]).squeeze(1)
            node = 2 * node + 1 + (value > self.cut[node]).long()
        return nn.functional.one_hot(node - len(self.feature), len(self.feature) + 1).float()
