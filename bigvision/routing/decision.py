"""Where each region goes, decided once; and what a gate sees of a region by default.

Legend: B images, C channels, H, W rows and columns, R, S rows and columns of regions, T = B * R * S regions,
    E experts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bigvision.gating import Gated


@dataclass(frozen=True)
class Decision:
    """Where each region goes, decided once.

    Attributes:
        gated: what the gate decided, of T regions, image by image and row by row.
        shape: (B, R, S).
    """

    gated: Gated
    shape: tuple[int, int, int]

    @property
    def expert(self) -> Tensor:
        """int64 [B, R, S], the expert of the highest weight; -1 where there is none (nodata)."""
        mask = self.gated.mask
        best = self.gated.probs.detach().masked_fill(~mask, -torch.inf).argmax(1)
        return torch.where(mask.any(1), best, -1).view(self.shape)

    @property
    def score(self) -> Tensor:
        """float32 [B, R, S], that expert's probability; 0 where there is none."""
        best = self.expert.view(-1, 1)
        found = self.gated.probs.detach().gather(1, best.clamp(min=0)).squeeze(1)
        return torch.where(best.squeeze(1) >= 0, found, 0).view(self.shape)

    def chosen(self, expert: int) -> Tensor:
        """bool [B, R, S], the regions that an expert works on, where the gate's tensors are."""
        taken = self.gated.routing
        chosen = torch.zeros(taken.num_tokens, dtype=torch.bool, device=taken.token.device)
        chosen[taken.token[taken.expert == expert]] = True
        return chosen.view(self.shape)

    def mask(self, expert: int) -> NDArray[np.bool_]:
        """:meth:`chosen` in numpy."""
        return self.chosen(expert).cpu().numpy()


def region_statistics(x: Tensor, region: int) -> Tensor:
    """Mean and standard deviation of each channel in each region: [T, 2C] of x [B, C, H, W]."""
    wide = x if x.dtype == torch.float64 else x.float()

    def average(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, region, ceil_mode=True)

    mean = average(wide)
    spread = (average(wide.square()) - mean.square()).clamp(min=0).add(1e-12).sqrt()
    return torch.cat([mean, spread], 1).permute(0, 2, 3, 1).flatten(0, 2)
