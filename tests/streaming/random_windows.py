"""Random blocks that read windows of rows: convolutions, pools, resampling, padding, U shapes."""

from __future__ import annotations

import random

import torch
from random_apply import Apply
from random_rows import activation, batch_norm
from torch import Tensor, nn
from torch.nn import functional as F


def convolution(draw: random.Random, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    groups = draw.choice([1, 1, 1, channels])
    kernel = (draw.randint(1, 5), draw.randint(1, 4))
    dilation = (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2]))
    stride: int | tuple[int, int] = draw.choice([1, 1, 1, 2, 3, (2, 1), (1, 2)])
    padding: str | tuple[int, int] = (draw.randint(0, 4), draw.randint(0, 3))
    if draw.random() < 0.25:
        stride, padding = 1, draw.choice(["same", "valid"])
    mode = draw.choice(["zeros", "zeros", "zeros", "reflect", "replicate"])
    width = groups * draw.choice([1, 2]) if groups > 1 else draw.choice([2, 3, 4, 6])
    return nn.Conv2d(
        channels, width, kernel, stride, padding, dilation, groups, draw.random() < 0.5, padding_mode=mode
    )


def usual_convolution(draw: random.Random, x: Tensor) -> nn.Module:
    conv = nn.Conv2d(x.shape[1], 4, 3, draw.choice([1, 1, 2]), 1, bias=draw.random() < 0.5)
    if draw.random() < 0.3:
        return nn.Sequential(conv, nn.ReLU())
    return nn.Sequential(conv, batch_norm(draw, torch.empty(1, 4, 1, 1)), activation(draw, x))


def transposed(draw: random.Random, x: Tensor) -> nn.Module:
    stride = (draw.randint(1, 3), draw.randint(1, 3))
    dilation = (draw.choice([1, 1, 2]), draw.choice([1, 2]))
    extra = tuple(
        draw.randint(0, max(s, d) - 1) if draw.random() < 0.5 else 0
        for s, d in zip(stride, dilation, strict=True)
    )
    return nn.ConvTranspose2d(
        x.shape[1],
        x.shape[1],
        (draw.randint(1, 4), draw.randint(1, 4)),
        stride,
        (draw.randint(0, 2), draw.randint(0, 2)),
        extra,
        draw.choice([1, x.shape[1]]),
        draw.random() < 0.5,
        dilation,
    )


def pool(draw: random.Random, x: Tensor) -> nn.Module:
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    stride = draw.choice([None, 1, 2, 3, (1, 2), (2, 1)])
    padding = (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2))
    ceil = draw.random() < 0.5
    kind = draw.randrange(4)
    if kind == 0:
        return nn.MaxPool2d(kernel, stride, padding, draw.choice([1, 1, 2]), ceil_mode=ceil)
    if kind == 1:
        divisor = draw.choice([None, None, 3])
        return nn.AvgPool2d(kernel, stride, padding, ceil, draw.random() < 0.5, divisor)
    if kind == 2:
        return Apply(
            "max_pool2d with indices",
            lambda v: F.max_pool2d(v, kernel, stride, padding, return_indices=True)[0],
        )
    power = draw.choice([1.0, 2.0, 3.0])
    return Apply(f"lp_pool {power}", lambda v: F.lp_pool2d(v.abs() + 0.1, power, kernel, stride, ceil))


def resampling(draw: random.Random, x: Tensor) -> nn.Module:
    mode = draw.choice(["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
    smooth = mode in ("bilinear", "bicubic")
    align = draw.random() < 0.5 if smooth else None
    if draw.random() < 0.5:
        size = tuple(
            draw.choice([max(1, n // 2), n, n + 1, 2 * n, 3 * n - 1, draw.randint(1, 40)])
            for n in x.shape[2:]
        )
        return Apply(
            f"{mode} to {size} {align}", lambda v: F.interpolate(v, size=size, mode=mode, align_corners=align)
        )
    scale = tuple(draw.choice([0.5, 0.3, 1.0, 1.5, 2.0, 2.3, 4.0, 3.0]) for _ in range(2))
    again = draw.random() < 0.3
    return Apply(
        f"{mode} by {scale} {align} recompute {again}",
        lambda v: F.interpolate(
            v, scale_factor=scale, mode=mode, align_corners=align, recompute_scale_factor=again or None
        ),
    )


def shuffling(draw: random.Random, x: Tensor) -> nn.Module:
    r = draw.choice([2, 3])
    if draw.random() < 0.5:
        return nn.PixelUnshuffle(r)
    return nn.Sequential(nn.Conv2d(x.shape[1], 2 * r * r, 1), nn.PixelShuffle(r))


def padding(draw: random.Random, x: Tensor) -> nn.Module:
    amounts = [draw.randint(-2, 3) for _ in range(4)]
    kind = draw.choice(["constant", "constant", "reflect", "replicate"])
    if kind != "constant":
        amounts = [abs(amount) for amount in amounts]
    value = draw.choice([0.0, 1.5]) if kind == "constant" else None
    return Apply(f"pad {amounts} {kind} {value}", lambda v: F.pad(v, amounts, kind, value))


def crop(draw: random.Random, x: Tensor) -> nn.Module:
    top, left = draw.randint(0, x.shape[2] - 1), draw.randint(0, x.shape[3] - 1)
    down, across = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2])
    end = draw.choice([None, -1])
    return Apply(f"crop {top}:{end}:{down} {left}::{across}", lambda v: v[:, :, top:end:down, left::across])


def u_shape(draw: random.Random, x: Tensor) -> nn.Module:
    """Down, through, up to the size of the skip."""
    channels = x.shape[1]
    down = draw.choice(
        [
            nn.Conv2d(channels, channels, 3, 2, 1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(channels, channels, 5, 4, 2),
        ]
    )
    deep = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
    mode, align = draw.choice(
        [("nearest", None), ("bilinear", False), ("bilinear", True), ("bicubic", False)]
    )
    join = draw.choice(
        [torch.add, torch.mul, lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([b, a], 1)]
    )

    def run(v: Tensor, down: nn.Module, deep: nn.Module) -> Tensor:
        return join(v, F.interpolate(deep(down(v)), size=v.shape[2:], mode=mode, align_corners=align))

    return Apply(f"U by {mode} {align}", run, down, deep)
