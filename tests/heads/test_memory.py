"""No tensor of B x C elements and no C x D gradient: every tensor that any operator makes is looked at."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heads import SGD, Adam, Margin, ShardedMarginHead, clustered, hashed, sampled

C, D, B, TILE = 4000, 24, 32, 100


class Largest(TorchDispatchMode):
    """Remembers the most elements that one operator put out, other than into memory that was there before."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.elements, self.culprit = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor) or leaf.untyped_storage().data_ptr() in self.known:
                continue
            if leaf.numel() > self.elements:
                self.elements, self.culprit = leaf.numel(), f"{func} {list(leaf.shape)}"
        return out


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("active", "optimizer"),
    [
        (None, SGD(0.1, momentum=0.9, weight_decay=1e-4)),
        (sampled(0.5, unbiased=True), SGD(0.1, momentum=0.9, weight_decay=1e-4, inactive="dense")),
        (clustered(20, 2), Adam(0.01)),
        (hashed(2, 6), SGD(0.1)),
    ],
)
def test_nothing_as_large_as_logits_or_a_gradient_of_all_classes(
    active: Any, optimizer: Any, storage: str
) -> None:
    head = ShardedMarginHead(
        C, D, Margin(1.0, 0.5, 0.0), active=active, optimizer=optimizer, storage=storage, tile=TILE
    )
    columns = [head.shard.store.whole(name) for name in head.shard.store.names]
    with Largest({column.untyped_storage().data_ptr() for column in columns}) as largest:
        for _ in range(2):
            x = torch.randn(B, D).requires_grad_()
            head(x, torch.randint(0, C, (B,))).backward()
    assert largest.elements <= 2 * C, largest.culprit
    assert 2 * C < C * D / 10 and 2 * C < B * C / 10
