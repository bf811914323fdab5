"""Margins that depend on the norm of the feature, a stand-in for the quality of the image.

Shapes: B gathered samples. A hook takes the norms [B] of all ranks' features, in rank order, and returns
(m1, m2, m3), each a number or a tensor [B]; what it computes differentiably reaches the features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Margins = tuple[Tensor | float, Tensor | float, Tensor | float]
AdaptiveMargin = Callable[[Tensor], Margins]


class AdaFace(nn.Module):
    """AdaFace (Kim et al. 2022, arXiv:2204.00964): hard margins for sharp images, soft ones for blurred.

    The norm is standardised by running statistics of the batches, q = clip((|x| - mean)/std * h, -1, 1);
    the angular margin is -m*q and the additive one m*q + m. No gradient passes through q. All ranks see
    all norms, so the statistics are the same on every rank.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__()
        self.m, self.h, self.momentum = m, h, momentum
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"m={self.m}, h={self.h}, momentum={self.momentum}"

    @torch.no_grad()
    def forward(self, norms: Tensor) -> Margins:
        """Margins of feature norms [B]; in training mode the statistics follow the batch."""
        norms = norms.clamp(1e-3, 100.0)
        if self.training and len(norms) > 1:
            self.mean.lerp_(norms.mean().to(self.mean.dtype), self.momentum)
            self.std.lerp_(norms.std().to(self.std.dtype), self.momentum)
        quality = ((norms - self.mean) / (self.std + 1e-3) * self.h).clamp(-1.0, 1.0)
        return 1.0, -self.m * quality, self.m * quality + self.m


@dataclass(frozen=True)
class MagFace:
    """MagFace (Meng et al. 2021, arXiv:2103.06627): an angular margin that grows with the feature's norm.

    m2 = (high - low)/(upper - lower) * (|x| - lower) + low for norms clipped into [lower, upper]. The
    gradient passes through the norm. `regularizer` is the paper's g(|x|) = |x|/upper^2 + 1/|x|, to be
    added to the loss with a weight of the caller's (35 in the paper).
    """

    lower: float = 10.0
    upper: float = 110.0
    low: float = 0.45
    high: float = 0.8

    def __call__(self, norms: Tensor) -> Margins:
        """Margins of feature norms [B]."""
        slope = (self.high - self.low) / (self.upper - self.lower)
        return 1.0, slope * (norms.clamp(self.lower, self.upper) - self.lower) + self.low, 0.0

    def regularizer(self, norms: Tensor) -> Tensor:
        """Mean over the samples of |x|/upper^2 + 1/|x|."""
        clipped = norms.clamp(self.lower, self.upper)
        return (clipped / self.upper**2 + 1.0 / clipped).mean()
