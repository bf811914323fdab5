"""Networks around one ATen operator: any operator, any arguments, any layout of its operands.

An operator is one line of `OPERATORS`: a function of a draw and of a streamed value. Its choices are replayed
every time that the network runs (a draw starts again from its seed), and the held values that it asks for are
made at the first run and kept as parameters, buffers or constants.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from operator_table import OPERATORS
from torch import Tensor, nn
from torch.nn import functional as F


class Draw:
    """The choices of one run of a part of a network, the same in every run.

    Args:
        part: whose choices they are.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.random = part, random.Random(part.seed)
        self.count = 0

    def pick(self, *choices: Any) -> Any:
        """One of them."""
        return self.random.choice(choices)

    def yes(self, probability: float = 0.5) -> bool:
        """True so often."""
        return self.random.random() < probability

    def number(self, low: int, high: int) -> int:
        """low..high, both included."""
        return self.random.randint(low, high)

    def real(self, low: float = -1.5, high: float = 1.5) -> float:
        """A number between them."""
        return round(self.random.uniform(low, high), 3)

    def axis(self, x: Tensor) -> int:
        """One of the axes, counted from either end."""
        return self.random.randrange(-x.ndim, x.ndim) if x.ndim else 0

    def axes(self, x: Tensor) -> Any:
        """Some of the axes, mostly those of the image."""
        if self.yes(0.4) and x.ndim >= 2:
            return self.pick((-1, -2), (x.ndim - 2, x.ndim - 1), -1, -2)
        chosen = self.random.sample(range(x.ndim), self.number(1, max(x.ndim, 1)))
        return [axis - x.ndim if self.yes(0.3) else axis for axis in chosen]

    def held(self, *shape: int) -> Tensor:
        """A parameter, a buffer or a constant of that shape."""
        self.count += 1
        kind = self.pick("parameter", "parameter", "buffer", "constant")
        return self.part.held(self.count - 1, shape, kind)

    def index(self, size: int, *shape: int) -> Tensor:
        """A held tensor of indices below `size`."""
        self.count += 1
        return self.part.indices(self.count - 1, size, shape)

    def streamed(self, x: Tensor) -> Tensor:
        """Another streamed value of the same shape."""
        kind = self.pick("tanh", "itself", "flip", "relu")
        return {"tanh": x.tanh() * 1.7 + 0.3, "itself": x, "flip": x.flip(0), "relu": x.relu() + 0.1}[kind]

    def tensor(self, x: Tensor) -> Tensor:
        """An operand that broadcasts with x: streamed or held, whole or of one row, one column ..."""
        kind = self.random.random()
        if kind < 0.35:
            return self.streamed(x)
        if kind < 0.45 and x.ndim:
            return x.narrow(self.axis(x), 0, 1)
        if kind < 0.55 and x.ndim:
            return x.mean(self.axes(x), keepdim=True)
        if kind < 0.7:
            return self.held(*x.shape)
        shape = [size if self.yes() else 1 for size in x.shape]
        return self.held(*shape[self.number(0, x.ndim) if self.yes(0.4) else 0 :])

    def operand(self, x: Tensor) -> Any:
        """A tensor or a number."""
        return self.real() if self.yes(0.15) else self.tensor(x)

    def two(self, x: Tensor) -> list[Tensor]:
        """x and another tensor, in either order."""
        pair = [x, self.tensor(x)]
        self.random.shuffle(pair)
        return pair

    def few(self, x: Tensor) -> list[Tensor]:
        """x among up to two values of its shape, streamed or held."""
        values = [x] + [
            self.streamed(x) if self.yes() else self.held(*x.shape) for _ in range(self.number(0, 2))
        ]
        self.random.shuffle(values)
        return values


class Part(nn.Module):
    """A part of a network whose forward is drawn anew, alike, in every run."""

    def __init__(self, seed: int, function: Callable[[Draw, Tensor], Any]) -> None:
        super().__init__()
        self.seed, self.function = seed, function
        self.values: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        return self.function(Draw(self), x)

    def held(self, number: int, shape: tuple[int, ...], kind: str) -> Tensor:
        """The held value of that number."""
        name = f"held{number}"
        if number not in self.values:
            generator = torch.Generator().manual_seed(self.seed + number)
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.values[number] = value
            if kind == "parameter":
                setattr(self, name, nn.Parameter(value))
            elif kind == "buffer":
                self.register_buffer(name, value)
        return getattr(self, name, self.values[number])

    def indices(self, number: int, size: int, shape: tuple[int, ...]) -> Tensor:
        """The held indices of that number."""
        name = f"held{number}"
        if number not in self.values:
            generator = torch.Generator().manual_seed(self.seed + number)
            self.values[number] = torch.randint(size, shape, generator=generator)
            self.register_buffer(name, self.values[number])
        return getattr(self, name)


class AnyNetwork(nn.Module):
    """Something usual, one operator in some layout, something usual again.

    Args:
        seed: decides all of it.
        name: of the operator, a line of `OPERATORS`; None: decided by the seed, too.
    """

    def __init__(self, seed: int, name: str | None = None) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.seed, self.name = seed, name or random.Random(f"operator {seed}").choice(list(OPERATORS))
        size = [1, 2, 3, 5, 7, 8, 12, 17, 20, 32, 32]
        self.shape = (draw.randint(1, 4), draw.choice(size), draw.choice(size))
        self.rows = draw.randint(1, self.shape[1])
        self.first = nn.Conv2d(self.shape[0], draw.choice([2, 3, 4, 4]), draw.choice([1, 3]), padding="same")
        self.before, self.operator, self.after = (
            Part(draw.randrange(2**31), function) for function in (before, self._operated, self._after)
        )
        self.double().eval()

    def _operated(self, draw: Draw, v: Tensor) -> Tensor:
        x, back = arranged(draw, v)
        y = numbers(draw, chosen(draw, OPERATORS[self.name](draw, x)))
        return back(y) if y.shape == x.shape and draw.yes(0.9) else y

    def forward(self, image: Tensor) -> Tensor:
        self.size = image.shape[-2:]
        return self.after(self.operator(self.before(self.first(image))))

    def _after(self, draw: Draw, y: Tensor) -> Tensor:
        y = after(draw, y)
        resized = y.ndim == 4 and y.is_floating_point() and y.shape[-2:] != self.size and draw.yes(0.7)
        return F.interpolate(y, size=self.size, mode=draw.pick("nearest", "bilinear")) if resized else y

    def extra_repr(self) -> str:
        return f"seed={self.seed}, operator={self.name}, shape={self.shape}, rows={self.rows}"


def before(draw: Draw, x: Tensor) -> Tensor:
    """A small part of usual operators, or none."""
    kind = draw.pick("nothing", "relu", "pool", "stride", "up", "norm", "crop")
    if kind == "relu":
        return x.relu()
    if kind == "pool":
        return F.max_pool2d(x, draw.pick(2, 3), draw.pick(1, 2), 1)
    if kind == "stride":
        return F.conv2d(x, draw.held(4, x.shape[1], 3, 3), stride=draw.pick(1, 2), padding=1)
    if kind == "up":
        return F.interpolate(x, scale_factor=2.0, mode=draw.pick("nearest", "bilinear"))
    if kind == "norm":
        return F.group_norm(x, 1)
    return x[:, :, draw.number(0, 1) :] if kind == "crop" else x


def after(draw: Draw, y: Tensor) -> Tensor:
    """Mostly brings the result to a map of classes at some size, and goes on with it."""
    if y.ndim == 3 and draw.yes():
        y = y[None]
    if y.ndim == 4 and len(y) > 1 and draw.yes(0.7):
        y = y.sum(0, keepdim=True)
    kind = draw.pick("nothing", "relu", "conv", "conv", "pool", "up", "mean")
    if kind == "relu":
        return y.relu()
    if y.ndim != 4 or kind == "nothing":
        return y
    if kind == "conv":
        return F.conv2d(y, draw.held(3, y.shape[1], 3, 3), draw.held(3), padding=1)
    if kind == "pool":
        return F.avg_pool2d(y, draw.pick(2, 3), 1, 1)
    if kind == "mean":
        return y - y.mean((2, 3), keepdim=True)
    return F.interpolate(y, scale_factor=2.0, mode="nearest")


Back = Callable[[Tensor], Tensor]


def arranged(draw: Draw, v: Tensor) -> tuple[Tensor, Back]:
    """The map [1, C, H, W] in some layout, and the way back."""
    n, c, h, w = v.shape
    kind = draw.pick(
        "plain", "plain", "plain", "plain", "permuted", "last", "transposed", "flat", "tokens", "image",
        "plane", "dates", "spread", "longer", "groups", "windows", "rows",
    )  # fmt: skip
    if kind == "permuted":
        order = draw.random.sample(range(4), 4)
        return v.permute(order), lambda y: y.permute([order.index(axis) for axis in range(4)])
    if kind == "last":
        return v.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)
    if kind == "transposed":
        return v.mT, lambda y: y.mT
    if kind == "flat":
        return v.flatten(2), lambda y: y.view(n, c, h, w)
    if kind == "tokens":
        return v.flatten(2).transpose(1, 2), lambda y: y.transpose(1, 2).reshape(n, c, h, w)
    if kind == "image":
        return v[0], lambda y: y[None]
    if kind == "plane":
        return v[0, 0], lambda y: y[None, None]
    if kind == "dates":
        return torch.cat([v, v.tanh() * 2 - 0.5], 0), lambda y: y[:1] - y[1:]
    if kind == "spread":
        return v.expand(2, -1, -1, -1), lambda y: y.sum(0, keepdim=True)
    if kind == "longer":
        axis = draw.number(0, 4)
        return v.unsqueeze(axis), lambda y: y.squeeze(axis)
    if kind == "groups" and c % 2 == 0:
        return v.unflatten(1, (2, c // 2)), lambda y: y.flatten(1, 2)
    if kind == "windows" and h % 2 == 0:
        return v.unflatten(2, (h // 2, 2)), lambda y: y.flatten(2, 3)
    if kind == "rows":
        return v.mean(3), lambda y: y[..., None]
    return v, lambda y: y


def chosen(draw: Draw, result: Any) -> Tensor:
    """The result, or one or two of several."""
    if isinstance(result, Tensor):
        return result
    several = list(result)
    if draw.yes(0.3) and len(several) > 1 and several[0].shape == several[-1].shape:
        return several[0].double() + several[-1]
    return draw.pick(*several)


def numbers(draw: Draw, y: Tensor) -> Tensor:
    """Floating-point numbers, mostly, of whatever they are."""
    if y.is_complex():
        return draw.pick(lambda: y.abs(), lambda: y.real, lambda: torch.view_as_real(y))()
    if y.is_floating_point() or draw.yes(0.1):
        return y
    return draw.pick(lambda: y.double(), lambda: y * 0.5, lambda: y.to(torch.float64))()


def usable(y: Any) -> bool:
    """A tensor with numbers in it, not too many of them."""
    return isinstance(y, Tensor) and 0 < y.numel() <= 60_000 and not y.is_complex() and math.prod(y.shape) > 0
