"""Random blocks that need the whole image: norms, squeeze-and-excite, pooling to bins, classifiers."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from random_apply import Apply
from torch import Tensor, nn
from torch.nn import functional as F


def normalisation(draw: random.Random, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    norm = draw.choice(
        [
            nn.GroupNorm(1, channels),
            nn.GroupNorm(channels, channels),
            nn.InstanceNorm2d(channels, affine=True),
            nn.InstanceNorm2d(channels),
        ]
    )
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return norm


def excitation(draw: random.Random, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    name, pooled = draw.choice(
        [
            ("mean", lambda v: v.mean((2, 3), keepdim=True)),
            ("adaptive", lambda v: F.adaptive_avg_pool2d(v, 1)),
            ("max", lambda v: F.adaptive_max_pool2d(v, 1)),
            ("amax", lambda v: v.amax((2, 3), keepdim=True)),
            ("amin", lambda v: v.amin((-1, -2), keepdim=True)),
            ("norm", lambda v: v.norm(p=2, dim=(2, 3), keepdim=True) / v.shape[-1]),
            ("std", lambda v: (v + 0.1 * v[:, :1].square()).std((2, 3), keepdim=True)),
            ("var", lambda v: v.var((2, 3), keepdim=True, unbiased=False)),
            ("sum", lambda v: v.sum((2, 3), keepdim=True) / v.shape[-1]),
            ("window", lambda v: F.avg_pool2d(v, v.shape[-2:])),
            ("flat", lambda v: v.mean((2, 3))[:, :, None, None]),
            ("column by column", lambda v: v.mean(2, keepdim=True).mean(3, keepdim=True)),
            ("row means", lambda v: v.mean(3, keepdim=True)),
            ("column means", lambda v: v.mean(2, keepdim=True)),
        ]
    )
    return Apply(
        f"squeeze-and-excite by {name}",
        lambda v, down, up: v * up(F.silu(down(pooled(v)))).sigmoid(),
        nn.Conv2d(channels, 2, 1),
        nn.Conv2d(2, channels, 1),
    )


def image_pooling(draw: random.Random, x: Tensor) -> nn.Module:
    """ASPP's and the pyramid's way: bins of the image, spread over it again."""
    bins = draw.choice([1, 1, 2, 3, (1, 2), (2, 1), 6])
    adaptive = draw.choice([F.adaptive_avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
    mode, align = draw.choice([("nearest", None), ("bilinear", False), ("bilinear", True)])
    join = draw.choice([torch.add, lambda a, b: torch.cat([a, b], 1), lambda a, b: b])

    def spread(v: Tensor, conv: nn.Module) -> Tensor:
        return join(
            v, F.interpolate(conv(adaptive(v, bins)), size=v.shape[2:], mode=mode, align_corners=align)
        )

    return Apply(
        f"{adaptive.__name__} to {bins}, {mode} {align}", spread, nn.Conv2d(x.shape[1], x.shape[1], 1)
    )


def adaptive_pool(draw: random.Random, x: Tensor) -> nn.Module:
    size = tuple(draw.choice([1, 2, n, max(n // 2, 1), n + 1, draw.randint(1, 12)]) for n in x.shape[2:])
    kind = draw.choice([nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
    return kind(size)


def classifier(draw: random.Random, x: Tensor) -> tuple[Callable[..., Tensor], nn.Module]:
    pooled = draw.choice(
        [
            lambda v: F.adaptive_avg_pool2d(v, 1).flatten(1),
            lambda v: v.mean((2, 3)),
            lambda v: v.amax((2, 3)),
            lambda v: F.adaptive_max_pool2d(v, 1).view(1, -1),
        ]
    )
    return (lambda v, head: head(pooled(v)), nn.Linear(x.shape[1], 3))
