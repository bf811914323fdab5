"""Margins that depend on the norm of the feature, a stand-in for the quality of the image.

Shapes: V valid samples of all ranks (label not -1), in rank order. A hook takes their norms [V] and returns
(m1, m2, m3) or (m1, m2, m3, penalty), each a number or a tensor [V]; what it computes differentiably reaches
the features. The penalty's mean is added to the loss.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Value = Tensor | float
Margins = tuple[Value, Value, Value] | tuple[Value, Value, Value, Value]
AdaptiveMargin = Callable[[Tensor], Margins]


def run_margin(margin: AdaptiveMargin, norms: Tensor) -> tuple[Value, Value, Value, Value]:
    """(m1, m2, m3, penalty) of norms [V]. Raises ValueError where the hook returns something else."""
    found: Sequence[Any] = margin(norms)
    if len(found) not in (3, 4):
        raise ValueError(f"a margin returns (m1, m2, m3) or (m1, m2, m3, penalty), got {len(found)} values")
    for name, value in zip(("m1", "m2", "m3", "penalty"), found, strict=False):
        if isinstance(value, Tensor) and value.shape not in (norms.shape, ()):
            raise ValueError(
                f"{name} must be a number or [{len(norms)}], one a sample, got {list(value.shape)}"
            )
    return found[0], found[1], found[2], found[3] if len(found) == 4 else 0.0


def claimed(margin: Any, device: torch.device) -> Any:
    """The margin as one head's own, on its device.

    What keeps statistics belongs to one head: a second one that is given it gets a copy, or training one
    would move the other's losses.
    """
    if not isinstance(margin, nn.Module):
        return margin
    if getattr(margin, "_claimed", False):
        margin = deepcopy(margin)
    margin._claimed = True
    return margin.to(device)


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

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaFace":
        """Follows the model to another device; stays float32, or the small steps of its averages get lost."""
        super()._apply(lambda x: x.to(fn(x).device), recurse)
        return self

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"m={self.m}, h={self.h}, momentum={self.momentum}"

    @torch.no_grad()
    def forward(self, norms: Tensor) -> Margins:
        """Margins of feature norms [V]; in training mode the statistics follow the batch."""
        norms = norms.clamp(1e-3, 100.0)
        if self.training and len(norms) > 1:
            self.mean.lerp_(norms.mean().to(self.mean.dtype), self.momentum)
            self.std.lerp_(norms.std().to(self.std.dtype), self.momentum)
        quality = ((norms - self.mean) / (self.std + 1e-3) * self.h).clamp(-1.0, 1.0)
        return 1.0, -self.m * quality, self.m * quality + self.m


@dataclass(frozen=True)
class MagFace:
    """MagFace (Meng et al. 2021, arXiv:2103.06627): an angular margin that grows with the feature's norm.

    m2 = (high - low)/(upper - lower) * (|x| - lower) + low for norms clipped into [lower, upper], which alone
    would only pull norms down. The penalty * g(|x|), with g = |x|/upper^2 + 1/|x| of the same clipped norm
    (`regularizer`), is added to the loss and pulls them up: the nearer a feature is to its centre, the larger
    is the norm where both pulls are even. The gradient passes through the norm.
    """

    lower: float = 10.0
    upper: float = 110.0
    low: float = 0.45
    high: float = 0.8
    penalty: float = 35.0

    def __call__(self, norms: Tensor) -> Margins:
        """Margins and penalty of feature norms [V]."""
        clipped = norms.clamp(self.lower, self.upper)
        slope = (self.high - self.low) / (self.upper - self.lower)
        return 1.0, slope * (clipped - self.lower) + self.low, 0.0, self.penalty * self._g(clipped)

    def regularizer(self, norms: Tensor) -> Tensor:
        """Mean of g over the samples, which the loss contains `penalty` times."""
        return self._g(norms.clamp(self.lower, self.upper)).mean()

    def _g(self, clipped: Tensor) -> Tensor:
        return clipped / self.upper**2 + 1.0 / clipped
