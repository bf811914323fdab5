"""Small networks with different strides, halos and operators, and a gate that does as it is told."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import Gate


def convolutions(channels: int, classes: int) -> nn.Module:
    """Stride 1, halo 3, a bias everywhere so that padding between layers matters."""
    return nn.Sequential(
        nn.Conv2d(channels, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 5, padding=2, groups=1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, classes, 1),
    )


class Hourglass(nn.Module):
    """Pooling, a skip, three ways up: stride 8."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.three = nn.Conv2d(6, 8, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.head = nn.Conv2d(10, classes * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x).relu()
        b = self.two(a).relu()
        c = self.three(functional.max_pool2d(b, 3, 2, 1)).relu()
        d = functional.interpolate(
            functional.avg_pool2d(c, 2), scale_factor=2, mode="bilinear", align_corners=False
        )
        b = b + self.up(c + d)
        b = functional.interpolate(b, scale_factor=2, mode="nearest")
        y = self.head(functional.avg_pool2d(torch.cat([a, b], 1), 2))
        return functional.pixel_shuffle(y, 2)


class Told(nn.Module):
    """A scorer of the logits that it holds."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def told(experts: Tensor, count: int) -> Gate:
    """A gate that routes region t to experts[t] with weight 1."""
    logits = torch.nn.functional.one_hot(experts.flatten(), count).float() * 4
    return Gate(Told(logits), straight=True)


def convolved_pixels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Output pixels of every convolution from now on, in the order in which they run."""
    pixels: list[int] = []
    original = functional.conv2d

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = original(x, *args, **kwargs)
        pixels.append(y.shape[0] * y.shape[-2] * y.shape[-1])
        return y

    monkeypatch.setattr(functional, "conv2d", counted)
    return pixels
