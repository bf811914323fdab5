"""Sticky routing: an item that comes back is pulled to where it went before.

Legend: T tokens, E experts, I items (places, images, classes) that come back.
"""

import torch
from torch import Tensor, nn

from .rows import sum_rows


class StickyScores(nn.Module):
    """Exponential moving averages of scores by item, blended into the scores that select.

    The memory is this process's: ranks that share items should each see the same ones again.

    Args:
        num_items: I.
        num_experts: E.
        decay: of the average, in [0, 1): 0 remembers the last visit only.
        strength: in [0, 1], the share of memory in a blended score.

    Raises:
        ValueError: a number outside its range.
    """

    average: Tensor
    seen: Tensor

    def __init__(
        self, num_items: int, num_experts: int, *, decay: float = 0.9, strength: float = 0.5
    ) -> None:
        super().__init__()
        if not (0 <= decay < 1 and 0 <= strength <= 1):
            raise ValueError(f"decay must be in [0, 1) and strength in [0, 1], got {decay} and {strength}")
        self.decay, self.strength = decay, strength
        self.register_buffer("average", torch.zeros(num_items, num_experts))
        self.register_buffer("seen", torch.zeros(num_items, dtype=torch.bool))

    def blend(self, scores: Tensor, items: Tensor) -> Tensor:
        """(1 - strength) * scores + strength * memory; an item never seen keeps its scores.

        Args:
            scores: float [T, E].
            items: int64 [T] in 0..I-1.
        """
        self._check(scores, items)
        memory = torch.where(self.seen[items][:, None], self.average[items].to(scores.dtype), scores)
        return torch.lerp(scores, memory, self.strength)

    @torch.no_grad()
    def observe(self, scores: Tensor, items: Tensor) -> None:
        """Average the scores [T, E] of items int64 [T] in; an item met twice counts by its mean."""
        self._check(scores, items)
        present, slot, times = items.unique(return_inverse=True, return_counts=True)
        mean = sum_rows(scores.to(self.average.dtype), slot, len(present)) / times[:, None]
        old = torch.where(self.seen[present][:, None], self.average[present], mean)
        self.average[present] = old * self.decay + mean * (1 - self.decay)
        self.seen[present] = True

    def _check(self, scores: Tensor, items: Tensor) -> None:
        num_items, num_experts = self.average.shape
        if scores.shape != (len(items), num_experts) or items.dtype != torch.int64 or items.dim() != 1:
            raise ValueError(
                f"scores are [T, {num_experts}] and items int64 [T], "
                f"got {list(scores.shape)} and {items.dtype} {list(items.shape)}"
            )
        if len(items) and not (int(items.min()) >= 0 and int(items.max()) < num_items):
            raise ValueError(
                f"items must be in [0, {num_items}), got {int(items.min())} to {int(items.max())}"
            )
