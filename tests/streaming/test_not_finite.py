"""NaN and infinity go as far in a streamed map as in the whole image, and no farther."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from forward_oracle import in_place, restored
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import trace
from bigvision.streaming.compiled import compiled
from bigvision.streaming.program import compile_program

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(F, name)
        for name in (
            *(
                "relu",
                "relu6",
                "hardtanh",
                "hardswish",
                "hardsigmoid",
                "sigmoid",
                "tanh",
                "silu",
                "leaky_relu",
            ),
            *("elu", "softplus", "mish", "logsigmoid"),
        )
    },
    "clamp": lambda v: v.clamp(-1, 1),
    "the greater of two": lambda v: torch.maximum(v, v.flip(1)),
    "where": lambda v: torch.where(v > 0, v, -v),
    "channel maximum": lambda v: v - v.amax(1, keepdim=True),
    "channel argmax": lambda v: v.relu() * v.argmax(1, keepdim=True).to(v.dtype),
    "softmax": lambda v: v.softmax(1),
    "max pool": lambda v: F.max_pool2d(v, 3, 2, 1),
    "max pool with indices": lambda v: F.max_pool2d(v, 3, 1, 1, return_indices=True)[0],
    "average pool": lambda v: F.avg_pool2d(v, 3, 1, 1),
    "nearest": lambda v: F.interpolate(v, scale_factor=2),
    "nearest down": lambda v: F.interpolate(v, size=(5, 7)),
    "bilinear": lambda v: F.interpolate(v, scale_factor=2, mode="bilinear"),
    "bilinear to any size": lambda v: F.interpolate(v, size=(17, 11), mode="bilinear", align_corners=True),
    "bicubic": lambda v: F.interpolate(v, size=(17, 11), mode="bicubic"),
    "area": lambda v: F.adaptive_avg_pool2d(v, (5, 3)),
    "area up": lambda v: F.adaptive_avg_pool2d(v, (17, 9)),
    "reflection": lambda v: F.pad(v, (1, 1, 2, 2), mode="reflect"),
    "sum": lambda v: v * v.sum((2, 3), keepdim=True),
    "norm": lambda v: v + v.norm(dim=(2, 3), keepdim=True),
    "deviation": lambda v: v + v.std((2, 3), keepdim=True),
    "maximum": lambda v: v + v.amax((2, 3), keepdim=True),
    "minimum": lambda v: v + v.amin((2, 3), keepdim=True),
    "global maximum": lambda v: v + F.adaptive_max_pool2d(v, 1),
    "window maximum": lambda v: v + F.max_pool2d(v, v.shape[-2:]),
    "bins of maxima": lambda v: v + F.interpolate(F.adaptive_max_pool2d(v, (3, 2)), size=v.shape[-2:]),
    "bins of means": lambda v: v + F.interpolate(F.adaptive_avg_pool2d(v, (1, 2)), size=v.shape[-2:]),
    "group norm": lambda v: F.group_norm(v, 4),
}


class After(nn.Module):
    """A function of a convolution that keeps every pixel to itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 1, groups=4), function
        self.last = nn.Conv2d(4, 4, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.conv(x)))
        return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_in_the_whole_image(name: str) -> None:
    torch.manual_seed(0)
    model, image = After(FUNCTIONS[name]).eval(), torch.randn(4, 12, 9)
    # Above and below each other in one bin, each way round; in a channel of its own; at the edge.
    image[2, 9, 2] = -torch.inf
    image[0, 2, 4] = image[1, 7, 5] = image[3, 11, 0] = torch.nan
    image[0, 3, 4], image[1, 6, 5], image[2, 5, 8] = torch.inf, torch.inf, -torch.inf
    program = compile_program(trace(model, (4, 12, 9)))
    merged = replace(program, lower=compiled)
    with torch.no_grad():
        whole = model(image[None])
        for rows in (1, 5):
            for found in (in_place(program, image, rows), in_place(merged, image, rows)):
                torch.testing.assert_close(found, whole, equal_nan=True)
            torch.testing.assert_close(restored(program, image, rows), whole, equal_nan=True)


def test_bins_of_a_tall_map_keep_what_is_not_finite_to_themselves() -> None:
    """So many rows a bin that its mean is a statistic."""

    class Bins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(x * self.weight, (3, 2))

    image = torch.randn(2, 64, 6)
    image[0, 10, 1], image[1, 60, 5] = torch.nan, torch.inf
    program = compile_program(trace(Bins(), (2, 64, 6)))
    with torch.no_grad():
        torch.testing.assert_close(in_place(program, image, 7), Bins()(image[None]), equal_nan=True)
