"""Angular and additive margins of the target logit.

With t the cosine between a feature and the centre of its own class and theta = arccos(t), the combined
margin of ArcFace (Deng et al. 2019, arXiv:1801.07698, equation 4) is psi(t) = cos(m1*theta + m2) - m3. That
cosine turns round at m1*theta + m2 = pi, after which a *worse* feature would be punished *less*. Here it
goes on falling instead, in the manner of SphereFace (Liu et al. 2017, arXiv:1704.08063): with phi =
m1*theta + m2 and k = floor(phi / pi), psi = (-1)^k cos(phi) - 2k - m3, continuous, with a continuous slope,
and falling in theta everywhere.

Shapes: B samples; every tensor here is [B].
"""

from dataclasses import dataclass
from math import isfinite, pi

import torch
from torch import Tensor


@dataclass(frozen=True)
class Margin:
    """The margins (m1, m2, m3): SphereFace (m, 0, 0), ArcFace (1, m, 0), CosFace (1, 0, m), or any mixture.

    `Margin(1, 0, 0)` is the normalised softmax. m1 multiplies the angle, m2 (radians) adds to it, m3 is
    taken off the cosine. Raises ValueError where m1 is not positive or a margin is not finite.
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0

    def __post_init__(self) -> None:
        if not all(isfinite(m) for m in (self.m1, self.m2, self.m3)) or self.m1 <= 0:
            raise ValueError(f"margins must be finite and m1 positive, got ({self.m1}, {self.m2}, {self.m3})")


@dataclass(frozen=True)
class TargetLogit:
    """psi(t) of each sample and its slopes. All [B]."""

    psi: Tensor
    d_cosine: Tensor
    d_m1: Tensor
    d_m2: Tensor
    d_m3: Tensor


def target_logit(cosine: Tensor, m1: Tensor | float, m2: Tensor | float, m3: Tensor | float) -> TargetLogit:
    """psi(t) = (-1)^k cos(phi) - 2k - m3 with phi = m1*arccos(t) + m2 and k = floor(phi/pi), and its slopes.

    `cosine` is [B], clamped into [-1, 1]. The slope m1*|sin(phi)|/sin(theta) keeps its denominator at or
    above the square root of the machine's epsilon, so it stays finite at theta = 0 and pi. Without angular
    margins psi is t - m3 and its slope exactly 1.
    """
    t = cosine.clamp(-1.0, 1.0)
    theta = torch.arccos(t)
    phi = m1 * theta + m2
    turns = torch.floor(phi / pi)
    sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
    d_phi = -sign * torch.sin(phi)  # = -|sin(phi)|
    sine = torch.sqrt((1.0 - t) * (1.0 + t)).clamp_min(torch.finfo(t.dtype).eps ** 0.5)
    psi = sign * torch.cos(phi) - 2.0 * turns - m3
    d_cosine = -d_phi * m1 / sine
    if isinstance(m1, float) and isinstance(m2, float) and (m1, m2) == (1.0, 0.0):
        psi, d_cosine = t - m3, torch.ones_like(t)
    return TargetLogit(psi, d_cosine, d_phi * theta, d_phi, torch.full_like(t, -1.0))


def plain_logit(product: Tensor) -> TargetLogit:
    """The plain softmax's: psi is x.w itself, [B], which is no cosine and has no bounds."""
    one, none = torch.ones_like(product), torch.zeros_like(product)
    return TargetLogit(product, one, none, none, -one)
