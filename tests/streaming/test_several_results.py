"""Operators with several results, whether ATen calls them a tuple or a list: forward and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forward_oracle import error, in_place, restored
from gradient_oracle import compare
from torch import Tensor, nn

from bigvision.graph import trace
from bigvision.streaming.losses import CrossEntropy
from bigvision.streaming.program import compile_program


class Between(nn.Module):
    """A function of one map between two convolutions of the image."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, channels, 3, padding=1), function
        self.last = nn.LazyConv2d(3, 3, padding=1)
        self(torch.zeros(1, 3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


def along_channels(split: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
    """The parts of a map read differently: the first through a window, the last twice, others not at all."""

    def function(v: Tensor) -> Tensor:
        first, *_, last = split(v)
        pooled = nn.functional.avg_pool2d(first, 3, 1, 1)
        return torch.cat([pooled, last.sigmoid(), last * last.mean((2, 3), keepdim=True)], 1)

    return function


def spread(v: Tensor) -> Tensor:
    """Parts of a statistic spread over the image, which wait for their readers: one reads a window."""
    first, last = v.mean((2, 3), keepdim=True).expand(v.shape).chunk(2, 1)
    return v + torch.cat([nn.functional.avg_pool2d(first * first, 5, 1, 2), last], 1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": along_channels(lambda v: v.chunk(2, 1)),
    "split": along_channels(lambda v: v.split(1, 1)),
    "split of a rest": along_channels(lambda v: v.split(3, 1)),
    "split_with_sizes": along_channels(lambda v: v.split([1, 2, 1], 1)),
    "tensor_split": along_channels(lambda v: v.tensor_split(3, 1)),
    "chunk of columns": lambda v: torch.cat(v.chunk(2, 3)[::-1], 3),
    "unbind": lambda v: torch.stack([one.sigmoid() for one in v.unbind(1)], 1),
    "unbind of a new axis": lambda v: torch.sub(*v.unflatten(1, (2, 2)).unbind(1)),
    "max over channels": lambda v: v.max(1, keepdim=True).values * v,
    "min over channels": lambda v: v.min(1, keepdim=True)[0] * v,
    "var_mean": lambda v: v * torch.var_mean(v, 1, keepdim=True)[0] + torch.var_mean(v, 1, keepdim=True)[1],
    "max_pool with indices": lambda v: nn.functional.max_pool2d(v, 3, 1, 1, return_indices=True)[0],
    "of held values": lambda v: v * v.mean((2, 3), keepdim=True).chunk(2, 1)[0].sigmoid()[:, :1],
    "spread": spread,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_reaches_what_is_before_them(name: str) -> None:
    torch.manual_seed(0)
    model = Between(FUNCTIONS[name])
    found = compare(model, (3, 11, 8), CrossEntropy(), torch.randint(0, 3, (11, 8)), rows=2)
    assert found.gradient < 1e-9
    assert found.loss < 1e-10


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_result_is_the_whole_images(name: str) -> None:
    torch.manual_seed(0)
    model, image = Between(FUNCTIONS[name]).double().eval(), torch.randn(3, 11, 8, dtype=torch.float64)
    program = compile_program(trace(model, (3, 11, 8)))
    with torch.no_grad():
        whole = model(image[None])
        for rows in (1, 3, 11):
            assert error(in_place(program, image, rows), whole) < 1e-12
            assert error(restored(program, image, rows), whole) < 1e-12
