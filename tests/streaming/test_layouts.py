"""Rows on other axes, several images on the batch axis, held operands with rows of their own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from forward_oracle import error, in_place, restored
from gradient_oracle import compare
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import UnsupportedOperatorError, fold_batch_norm, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.losses import SquaredError
from bigvision.streaming.program import compile_program
from bigvision.streaming.schedule import schedule

H, W = 32, 64
EXACT = 1e-10


class Between(nn.Module):
    """Convolutions around a function of a map of 4 channels and of held values."""

    def __init__(self, function: Callable[..., Tensor], *held: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 4, 3, padding=1), function
        self.last = nn.LazyConv2d(3, 3, padding=1)
        self.held = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in held)
        self(torch.randn(1, 2, H, W))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x).relu(), *self.held)).sum(0, keepdim=True)


def dates(v: Tensor) -> Tensor:
    """Two images on the batch axis, not alike."""
    return torch.cat([v, v.tanh() * 2 - 1], 0)


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "a held map stacked on the last axis": (lambda v, h: torch.stack([v, h], -1).mean(-1), [(1, 4, H, W)]),
    "a held map stacked on the first axis": (lambda v, h: torch.stack([v, h]).sum(0), [(1, 4, H, W)]),
    "a held map concatenated": (lambda v, h: torch.cat([h, v], 1), [(1, 2, H, W)]),
    "a 1-D value expanded": (lambda v, h: v * h.expand(1, 1, H, W), [(W,)]),
    "a number expanded": (lambda v, h: v * h.expand(1, 1, H, W), [()]),
    "PReLU with the rows last, as many as channels": (
        lambda v, h: F.prelu(torch.cat([v - k for k in range(8)], 1).mT, h).mT,
        [(H,)],
    ),
    "a vector from the right": (lambda v, h: (v @ h)[..., None] + v, [(W,)]),
    "a vector from the right, as many channels as rows": (
        lambda v, h: (torch.cat([v - k for k in range(8)], 1) @ h)[..., None] + v[:, :1],
        [(W,)],
    ),
    "two dates": (dates, []),
    "two dates, group norm": (lambda v: F.group_norm(dates(v), 2), []),
    "two dates, group norm with weights": (lambda v, h: F.group_norm(dates(v), 2, h, h), [(4,)]),
    "two dates, instance norm": (lambda v: F.instance_norm(dates(v)), []),
    "two dates, moments of a batch": (lambda v: F.batch_norm(dates(v), None, None, training=True), []),
    "two dates, mean": (lambda v: dates(v) * dates(v).mean((2, 3), keepdim=True), []),
    "two dates, std": (lambda v: dates(v) * dates(v).std((2, 3), keepdim=True), []),
    "two dates, var over all of them": (lambda v: dates(v) * dates(v).var((0, 2, 3), keepdim=True), []),
    "two dates, maximum": (lambda v: dates(v) * dates(v).amax((2, 3), keepdim=True), []),
    "two dates, pooled": (lambda v: dates(v) * F.adaptive_avg_pool2d(dates(v), 1), []),
    "two dates, pooled to the maximum": (lambda v: dates(v) * F.adaptive_max_pool2d(dates(v), 1), []),
    "std of every column": (lambda v: v * v.std(2, keepdim=True), []),
    "var of all": (lambda v: v * v.var(), []),
    "group norm of tokens": (lambda v: F.group_norm(v.transpose(2, 3), 2).transpose(2, 3), []),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_whole_image(case: str) -> None:
    torch.manual_seed(0)
    function, held = CASES[case]
    model, shape = Between(function, *held).double().eval(), (2, H, W)
    image = torch.randn(shape, dtype=torch.float64)
    program = compile_program(fold_batch_norm(trace(model, shape)))
    with torch.no_grad():
        whole = model(image[None])
        assert error(in_place(program, image, 5), whole) <= EXACT
        assert error(restored(program, image, 7), whole) <= EXACT
    target = torch.randn(whole.shape[1:], dtype=torch.float64)
    assert compare(model, shape, SquaredError(), target, rows=5, image=image).gradient <= 1e-9


def test_two_dates_in_float32() -> None:
    """Siamese slices of one batch: float32 has a weight gradient of its own."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            both = self.encoder(torch.cat([x[:, :1], x[:, 1:]], 0)).relu()
            return both[:1] - both[1:]

    torch.manual_seed(0)
    model, image, target = Siamese(), torch.randn(2, H, W), torch.randn(3, H, W)
    SquaredError()(model(image[None]), target[None]).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    StreamedModel(model, (2, H, W)).backward(image, target, SquaredError())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert error(parameter.grad, gradient) <= 1e-5


def test_a_schedule_that_cannot_end_is_refused() -> None:
    program = compile_program(trace(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), (1, 9, 9)))
    (walk,) = program.passes
    stages = tuple(replace(one, size=one.size + 1) if one is walk.output else one for one in walk.stages)
    with pytest.raises(UnsupportedOperatorError, match=r"relu at 1 .*of its 8 rows only 7 can be made"):
        schedule(replace(walk, stages=stages), 2)
