"""A selection for regions: the best expert of each, within the share that each expert may take.

Legend: T regions, E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision.gating import expert_choice, top_k


@dataclass(frozen=True)
class BudgetedTopOne:
    """Top-1, but an expert takes at most its share of the regions: those that want it most.

    The others go to the best of the experts that have room, so that nothing falls through as it would beyond
    a capacity. Regions without an allowed expert count for no share.

    Attributes:
        shares: [E], each in 0..1; experts of share 1 are unbounded, and there must be one.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares must be in 0..1, got {self.shares}")
        if 1 not in self.shares:
            raise ValueError(f"one expert must take what the others may not (share 1), got {self.shares}")

    def select(
        self,
        scores: Tensor,
        *,
        step: int = 0,
        force: Tensor | None = None,
        allowed: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Mask bool [T, E] of scores [T, E]; `previous` has no say, forced pairs count for the share."""
        if scores.shape[1] != len(self.shares):
            raise ValueError(f"{len(self.shares)} shares do not fit {scores.shape[1]} experts")
        free = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.clone()
        wanted = int(free.any(1).sum())
        mask = top_k(scores, 1, force=force, allowed=free)
        for _ in self.shares:  # one round closes one expert for good, so that nobody is sent back to it
            taken = mask.sum(0).tolist()
            room = [math.floor(share * wanted + 1e-9) for share in self.shares]
            over = [e for e, share in enumerate(self.shares) if share < 1 and taken[e] > room[e]]
            if not over:
                break
            expert = over[0]
            takes = mask[:, expert]
            stays = torch.zeros_like(takes) if force is None else force[:, expert] & takes
            column, rest = scores[:, expert : expert + 1].detach(), (takes & ~stays)[:, None]
            kept = expert_choice(column, max(room[expert] - int(stays.sum()), 0), allowed=rest).squeeze(1)
            free[:, expert] &= kept | stays
            mask = top_k(scores, 1, force=force, allowed=free)
        return mask
