"""Random networks of everything that streams, drawn operator by operator at a given image size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from random_apply import Apply
from random_rows import activation, arithmetic, batch_norm, joined, layer_norm, linear, over_channels
from random_statistics import adaptive_pool, classifier, excitation, image_pooling, normalisation
from random_windows import (
    convolution,
    crop,
    padding,
    pool,
    resampling,
    shuffling,
    transposed,
    u_shape,
    usual_convolution,
)
from torch import Tensor, nn

MOST_PIXELS, MOST_CHANNELS = 6000, 16

Choice = Callable[[random.Random, Tensor], nn.Module]

BLOCKS: list[Choice] = [
    *[usual_convolution] * 3,
    *[convolution] * 4,
    *[pool] * 3,
    *[resampling] * 3,
    *[u_shape] * 2,
    *[transposed] * 2,
    shuffling,
    padding,
    crop,
    activation,
    arithmetic,
    over_channels,
    layer_norm,
    linear,
    normalisation,
    batch_norm,
    excitation,
    image_pooling,
    adaptive_pool,
]


class RandomGraph(nn.Module):
    """`depth` random operators after the image, each reading a recent value or joining two.

    Args:
        draw: where choices come from.
        shape: (C, H, W) of the image that it must run on.
        depth: operators.
        choices: what they are drawn from.
    """

    def __init__(
        self,
        draw: random.Random,
        shape: tuple[int, int, int],
        depth: int,
        choices: Sequence[Choice] = BLOCKS,
    ) -> None:
        super().__init__()
        self.choices = choices
        self.operators = nn.ModuleList()
        self.precision = nn.Parameter(
            torch.zeros((), dtype=torch.float64)
        )  # a graph has its parameters' dtype
        self.reads: list[tuple[int, ...]] = []
        values = [torch.randn(1, *shape, dtype=torch.float64)]
        for _ in range(depth):
            self._grow(draw, values)
        if draw.random() < 0.15:
            self._try(Apply("tail", *classifier(draw, values[-1])), (len(values) - 1,), values)

    def _grow(self, draw: random.Random, values: list[Tensor]) -> None:
        for _ in range(8):
            at = len(values) - 1 if draw.random() < 0.8 else draw.randrange(len(values))
            if draw.random() < 0.25 and len(values) > 1:
                other = draw.randrange(len(values))
                if self._try(joined(draw, values[at], values[other]), (at, other), values):
                    return
            elif self._try(draw.choice(self.choices)(draw, values[at]), (at,), values):
                return

    def _try(self, module: nn.Module, reads: tuple[int, ...], values: list[Tensor]) -> bool:
        """Append the operator if it runs at this size and gives something sensible."""
        module.double().eval()
        try:
            with torch.no_grad():
                y = module(*(values[at] for at in reads))
        except (RuntimeError, ValueError):
            return False
        if not y.numel() or y.shape[1:].numel() > MOST_PIXELS or y.shape[1] > MOST_CHANNELS:
            return False
        if not torch.isfinite(y).all() or y.abs().max() > 1e4:
            return False
        self.operators.append(module)
        self.reads.append(reads)
        values.append(y)
        return True

    def forward(self, image: Tensor) -> Tensor:
        values = [image]
        for module, reads in zip(self.operators, self.reads, strict=True):
            values.append(module(*(values[at] for at in reads)))
        return values[-1]
