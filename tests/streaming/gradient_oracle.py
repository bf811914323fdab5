"""Whole-image autograd in float64, and random networks to hold streamed gradients against it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.backward import BackwardResult, backward
from bigvision.streaming.forecast import Budget
from bigvision.streaming.losses import CrossEntropy, Loss
from bigvision.streaming.program import compile_program
from bigvision.streaming.source import ImageRows


@dataclass(frozen=True)
class Compared:
    """The greatest relative error over the parameters' gradients, the loss's, and the streamed result."""

    gradient: float
    loss: float
    result: BackwardResult


def compare(
    model: nn.Module,
    shape: tuple[int, int, int],
    loss: Loss,
    target: Tensor,
    *,
    rows: int | None,
    mask: Tensor | None = None,
    budget: Budget | None = None,
    image: Tensor | None = None,
) -> Compared:
    """Streamed gradients of an eval-mode float64 model against plain autograd on the padded image."""
    model.double().eval()
    image = torch.randn(shape, dtype=torch.float64) if image is None else image
    streamed = StreamedModel(model, shape, dtype=torch.float64)
    expected, value = whole_gradients(model, image, streamed.stride, loss, target, mask)
    model.zero_grad()
    result = streamed.backward(image, target, loss, mask=mask, budget=budget or Budget(rows=rows))
    worst = 0.0
    for name, parameter in model.named_parameters():
        reference = expected[name]
        if reference is None or parameter.grad is None:
            assert reference is None or not reference.any(), f"{name} has no gradient"
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient"
            continue
        # A bias before a normalisation has no gradient but rounding.
        scale = max(float(reference.norm()), 1e-4 * max(_norm(one) for one in expected.values()))
        worst = max(worst, float((parameter.grad - reference).norm()) / max(scale, 1e-30))
    return Compared(worst, abs(result.loss - value) / max(abs(value), 1e-30), result)


def graph_gradient_error(model: nn.Module, shape: tuple[int, int, int], rows: int) -> float | None:
    """The error of the streamed gradient of a network at its own size, whatever the shape of its output.

    None where there is no gradient to compare with: none at all, none that is finite, or one that rounding of
    the image moves (see `settled`).
    """
    model = Framed(model, shape).double().eval()
    image = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, 3, shape[1:])
    program = compile_program(trace(model, shape))
    if program.output not in program.stages:  # of the few rows of a small image, gathered whole
        return None
    nearby = image * (1 + 1e-13 * torch.randn_like(image))
    try:
        moved = _all_gradients(model, nearby, target)
        expected = _all_gradients(model, image, target)
    except RuntimeError:  # an operator without a derivative
        return None
    if not expected.isfinite().all() or not expected.any():
        return None
    scale = float(expected.norm())
    if float((moved - expected).norm()) > 1e-9 * scale:
        return None
    model.zero_grad()
    source = ImageRows(image, shape, shape[1:], image.dtype, image.device)
    backward(program, source, target, CrossEntropy(), budget=Budget(rows=rows))
    return float((_flat(model) - expected).norm()) / scale


class Framed(nn.Module):
    """A network between two convolutions, its output brought to the image's size and three classes."""

    def __init__(self, body: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(shape[0], shape[0], 3, padding=1), body
        with torch.no_grad():
            made = self.body(torch.zeros(1, *shape, dtype=torch.float64))
        self.flat, self.size = made.ndim == 2, shape[1:]
        self.last = nn.Conv2d(shape[0] if self.flat else made.shape[1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.body(x)
        if self.flat:
            y = x * y.sum()
        return self.last(F.interpolate(y, size=self.size) if y.shape[-2:] != self.size else y)


def _all_gradients(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    whole_gradients(model, image, 1, CrossEntropy(), target, None)
    return _flat(model)


def _flat(model: nn.Module) -> Tensor:
    """All gradients in one vector, zeros where there is none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return torch.cat([one.flatten() for one in found])


def whole_gradients(
    model: nn.Module, image: Tensor, stride: int, loss: Loss, target: Tensor, mask: Tensor | None
) -> tuple[dict[str, Tensor | None], float]:
    """Every parameter's gradient and the loss, by plain autograd."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % stride, 0, -height % stride))[None]
    model.zero_grad()
    y: Any = model(padded)
    y = y["out"] if isinstance(y, dict) else y
    if y.ndim == 4:
        y, truth = y[..., :height, :width], target[None]
        if mask is not None:
            y, truth = y[:, :, mask], truth[..., mask]
    else:
        truth = target
    value = loss(y, truth)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters()}, float(value.detach())


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.norm())


class RandomNetwork(nn.Module):
    """A small network drawn from a seed: all that streams, in random order, with skips and U shapes."""

    def __init__(self, seed: int, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        width = draw.choice([4, 8])
        body = [nn.Conv2d(channels, width, 3, padding=1)]
        body += [random_block(draw, width, draw.randint(0, 2)) for _ in range(draw.randint(1, 4))]
        self.body = nn.Sequential(*body)
        self.head = nn.Conv2d(width, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear") if y.shape[-2:] != x.shape[-2:] else y


def random_block(draw: random.Random, width: int, depth: int) -> nn.Module:
    """A block that keeps the number of channels (and nearly the size)."""
    simple = [_convolution, _norm_and_activation, _pool, _squeeze_excite, _image_pooling, _bins, _shuffle]
    choices = simple + ([_u_shape] * 3 if depth else [])
    return draw.choice(choices)(draw, width, depth)


def _convolution(draw: random.Random, width: int, depth: int) -> nn.Module:
    kernel = draw.choice([(1, 1), (3, 3), (3, 1), (1, 3), (5, 3), (2, 2)])
    dilation = draw.choice([1, 1, 2])
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate"])
    groups = draw.choice([1, 1, 2, width])
    conv = nn.Conv2d(
        width,
        width,
        kernel,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw.random() < 0.5,
    )
    return nn.Sequential(conv, _activation(draw))


def _norm_and_activation(draw: random.Random, width: int, depth: int) -> nn.Module:
    norms = [
        nn.BatchNorm2d(width),
        nn.GroupNorm(2, width),
        nn.GroupNorm(1, width),
        nn.InstanceNorm2d(width, affine=True),
    ]
    return nn.Sequential(draw.choice(norms), _activation(draw))


def _activation(draw: random.Random) -> nn.Module:
    return draw.choice([nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Tanh()])


def _pool(draw: random.Random, width: int, depth: int) -> nn.Module:
    return draw.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=draw.random() < 0.5)])


class SqueezeExcite(nn.Module):
    """Channels scaled by a statistic of the image."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.kind = draw.choice(["mean", "pool", "max", "amax", "norm"])
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = {
            "mean": lambda: x.mean((2, 3), keepdim=True),
            "pool": lambda: F.adaptive_avg_pool2d(x, 1),
            "max": lambda: F.adaptive_max_pool2d(x, 1),
            "amax": lambda: x.amax((2, 3), keepdim=True),
            "norm": lambda: x.norm(p=2, dim=(2, 3), keepdim=True) / x.shape[-1],
        }[self.kind]()
        return x * self.up(F.silu(self.down(pooled))).sigmoid()


def _squeeze_excite(draw: random.Random, width: int, depth: int) -> nn.Module:
    return SqueezeExcite(draw, width)


class ImagePooling(nn.Module):
    """A statistic (bins of the image) spread over it again, as ASPP and pyramid pooling do."""

    def __init__(self, width: int, bins: int) -> None:
        super().__init__()
        self.bins, self.conv = bins, nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(F.adaptive_avg_pool2d(x, self.bins))
        return x + F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _image_pooling(draw: random.Random, width: int, depth: int) -> nn.Module:
    return ImagePooling(width, 1)


def _bins(draw: random.Random, width: int, depth: int) -> nn.Module:
    return ImagePooling(width, draw.choice([2, 3, 6]))


def _shuffle(draw: random.Random, width: int, depth: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2), nn.AvgPool2d(2))


class UShape(nn.Module):
    """Down, a body, up to the size of the skip, joined with it."""

    def __init__(self, draw: random.Random, width: int, depth: int) -> None:
        super().__init__()
        self.down = draw.choice(
            [
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 3, stride=3, padding=1),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.MaxPool2d(3, 2, 1),
                nn.AvgPool2d(2, ceil_mode=True),
            ]
        )
        self.body = nn.Sequential(*(random_block(draw, width, depth - 1) for _ in range(draw.randint(1, 2))))
        self.mode = draw.choice(["bilinear", "corners", "nearest", "bicubic", "transposed"])
        self.join = draw.choice(["add", "mul", "cat"])
        self.up = nn.ConvTranspose2d(width, width, 2, 2) if self.mode == "transposed" else nn.Identity()
        self.mix = nn.Conv2d(2 * width, width, 1) if self.join == "cat" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.body(self.down(x)))
        size = x.shape[-2:]
        if y.shape[-2:] != size:
            align = {"bilinear": False, "corners": True, "bicubic": False}
            mode = {"corners": "bilinear", "transposed": "nearest"}.get(self.mode, self.mode)
            y = F.interpolate(y, size=size, mode=mode, align_corners=align.get(self.mode))
        if self.join == "cat":
            return self.mix(torch.cat([x, y], 1))
        return x + y if self.join == "add" else x * y.sigmoid()


def _u_shape(draw: random.Random, width: int, depth: int) -> nn.Module:
    return UShape(draw, width, depth)
