"""Random networks of everything that streams, drawn operator by operator at a given image size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_PIXELS, MOST_CHANNELS = 6000, 16


class Apply(nn.Module):
    """A function of one value, with the modules it uses."""

    def __init__(self, name: str, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.name, self.function, self.parts = name, function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)

    def extra_repr(self) -> str:
        return self.name


@dataclass(frozen=True)
class Node:
    """One operator and the earlier values that it reads."""

    module: nn.Module
    reads: tuple[int, ...]


class RandomGraph(nn.Module):
    """`depth` random operators after the image, each reading a recent value or joining two.

    Args:
        draw: where choices come from.
        shape: (C, H, W) of the image that it must run on.
        depth: operators.
    """

    def __init__(self, draw: random.Random, shape: tuple[int, int, int], depth: int) -> None:
        super().__init__()
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
            elif self._try(draw.choice(OPERATORS)(draw, values[at]), (at,), values):
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


def activation(draw: random.Random, x: Tensor) -> nn.Module:
    return draw.choice(
        [
            nn.ReLU,
            nn.SiLU,
            nn.Hardswish,
            nn.Sigmoid,
            nn.ReLU6,
            nn.GELU,
            nn.Tanh,
            nn.LeakyReLU,
            nn.ELU,
            nn.Softplus,
            nn.Dropout2d,
            nn.Hardsigmoid,
            nn.Mish,
            nn.PReLU,
        ]
    )()


def arithmetic(draw: random.Random, x: Tensor) -> nn.Module:
    name, function = draw.choice(
        [
            ("half plus one", lambda v: v * 0.5 + 1),
            ("one minus", lambda v: 1 - v),
            ("clamp", lambda v: v.clamp(-1, 0.5)),
            ("where", lambda v: torch.where(v > 0, v, 0.1 * v)),
            ("masked", lambda v: v.masked_fill(v > 1, 1.0)),
            ("residual", lambda v: v + v.relu()),
            ("itself", lambda v: v * v.sigmoid() + v),
            ("abs", lambda v: (v.abs() + 0.1).sqrt()),
            ("in place", lambda v: F.relu(v + 1, inplace=True)),
            ("copied", lambda v: v.contiguous().clone().detach()),
            ("power", lambda v: (v.abs() + 0.1).pow(1.5)),
        ]
    )
    return Apply(name, function)


def over_channels(draw: random.Random, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    name, function = draw.choice(
        [
            ("softmax", lambda v: v.softmax(1)),
            ("log_softmax", lambda v: v.log_softmax(1).clamp(-20)),
            ("argmax", lambda v: v.argmax(1, keepdim=True).to(v.dtype)),
            ("argmax, axis dropped", lambda v: v.argmax(1).unsqueeze(1).double()),
            ("channel mean", lambda v: v - v.mean(1, keepdim=True)),
            ("channel max", lambda v: v * (v == v.amax(1, keepdim=True))),
            ("chunk", lambda v: torch.cat([part.relu() for part in v.chunk(2, 1)], 1)),
            ("split", lambda v: sum(v.split([1, channels - 1], 1)[0] * one for one in v.split(1, 1))),
            ("flip", lambda v: v.flip(1)),
            ("unbind", lambda v: torch.stack(v.unbind(1)[::-1], 1)),
            ("select", lambda v: v * v[:, :1] + v[:, 0].unsqueeze(1)),
            ("glu", lambda v: F.glu(torch.cat([v, v + 1], 1), 1)),
            ("channel shuffle", lambda v: F.channel_shuffle(torch.cat([v, v], 1), 2)),
            ("view", lambda v: v.view(1, channels, v.shape[2], v.shape[3]).reshape(v.shape)),
            ("split view", lambda v: torch.cat([v, v], 1).view(1, 2, channels, *v.shape[2:]).sum(1)),
            ("stack", lambda v: torch.stack([v, v.relu()], -1).mean(-1)),
            ("cumsum", lambda v: v.cumsum(1)),
        ]
    )
    return Apply(name, function)


def layer_norm(draw: random.Random, x: Tensor) -> nn.Module:
    norm = nn.LayerNorm(x.shape[1])
    nn.init.uniform_(norm.weight, 0.5, 2)
    return Apply("layer_norm", lambda v, n: n(v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm)


def linear(draw: random.Random, x: Tensor) -> nn.Module:
    """ConvNeXt's way: channels last, linear, scaled, back."""
    up, down = nn.Linear(x.shape[1], 6), nn.Linear(6, x.shape[1])
    return Apply(
        "linear",
        lambda v, a, b: v + 0.5 * b(F.gelu(a(v.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
        up,
        down,
    )


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


def batch_norm(draw: random.Random, x: Tensor) -> nn.Module:
    norm = nn.BatchNorm2d(x.shape[1], affine=draw.random() < 0.8)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
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


class Joined(nn.Module):
    """Two values, the second brought to the first's size and channels."""

    def __init__(
        self, name: str, function: Callable[[Tensor, Tensor], Tensor], conv: nn.Module, mode: str
    ) -> None:
        super().__init__()
        self.name, self.function, self.conv, self.mode = name, function, conv, mode

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if b.shape[2:] != a.shape[2:]:
            b = F.interpolate(b, size=a.shape[2:], mode=self.mode)
        return self.function(a, self.conv(b))


def joined(draw: random.Random, a: Tensor, b: Tensor) -> nn.Module:
    name, function = draw.choice(
        [
            ("add", torch.add),
            ("sub", torch.sub),
            ("mul", torch.mul),
            ("max", torch.maximum),
            ("cat", lambda x, y: torch.cat([x, y], 1)),
            ("twice", lambda x, y: torch.cat([x, y, x], 1)),
            ("where", lambda x, y: torch.where(x > y, x, 0.5 * (x + y))),
            ("div", lambda x, y: x / (y.abs() + 1)),
            ("gate", lambda x, y: x * y[:, :1].sigmoid()),
        ]
    )
    conv = nn.Identity() if a.shape[1] == b.shape[1] else nn.Conv2d(b.shape[1], a.shape[1], 1)
    return Joined(name, function, conv, draw.choice(["nearest", "bilinear"]))


OPERATORS: list[Callable[[random.Random, Tensor], nn.Module]] = [
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
