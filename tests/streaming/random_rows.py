"""Random blocks that treat every row by itself: elementwise, over channels, joins of two values."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from random_apply import Apply
from torch import Tensor, nn
from torch.nn import functional as F


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


def batch_norm(draw: random.Random, x: Tensor) -> nn.Module:
    norm = nn.BatchNorm2d(x.shape[1], affine=draw.random() < 0.8)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


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
