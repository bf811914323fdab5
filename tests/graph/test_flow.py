"""Rows are counted: what streams makes as many as the graph's shapes tell, or is refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import UnsupportedOperatorError, flows, trace
from bigvision.graph.geometry import geometry

H, W = 8, 12


class Between(nn.Module):
    """A convolution to two channels, then a function of its result and of held values."""

    def __init__(self, function: Callable[..., Tensor], *held: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 2, 3, padding=1), function
        self.held = nn.ParameterList(nn.Parameter(torch.randn(shape).abs()) for shape in held)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), *self.held)


def over_rows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator with the rows on axis 1, where it expects channels."""
    return lambda v, *held: operator(v.permute(0, 2, 1, 3), *held).permute(0, 2, 1, 3)


def _batch_norm(v: Tensor, moments: Tensor) -> Tensor:
    return F.batch_norm(v, moments.detach(), moments.detach())


@pytest.mark.parametrize(
    ("function", "held", "message"),
    [
        (lambda v: v + v[:, :, :1].expand(-1, -1, H, -1), [], "expand at the top level .*makes 8 rows of 1"),
        (lambda v: v * v[:, :, 3:4], [], r"mul at .*inputs have \[1, 8\] rows"),
        (lambda v, h: v[:, :, :1] * h, [(1, 2, H, W)], "mul at .*makes 8 rows of 1"),
        (lambda v, h: torch.where(v[:, :, :1] > 0, h, 0), [(H, W)], "where at .*makes 8 rows of 1"),
        (lambda v, a: a @ v[0, 0], [(7, H)], "matmul at .*its `other` is made of rows"),
        (lambda v, a: a @ v[0, 0], [(H, H)], "matmul at .*its `other` is made of rows"),
        (lambda v: v[:, :, H:].var() + v, [], "var at .*its input has no rows"),
        (lambda v: v @ v.mT, [], "matmul at .*different axes"),
        (lambda v: v[..., :H] @ v[..., :H], [], "matmul at .*its `other` is made of rows"),
        (lambda v, x: F.conv2d(x, v), [(1, 2, 12, 12)], "conv2d at .*its `weight` is made of rows"),
        (lambda v: F.layer_norm(v, [W], v[0, 0, 0]), [], "select at .*picks one row"),
        (
            lambda v: F.max_pool2d(v, 2, return_indices=True)[1] * 1.0,
            [],
            "max_pool2d_with_indices at .*result 1",
        ),
        (
            over_rows(_batch_norm),
            [(H,)],
            "batch_norm.* at .*rows on axis 1",
        ),
        (lambda v: F.adaptive_avg_pool2d(v.mT, 1), [], "adaptive_avg_pool2d at .*the last two axes"),
        (lambda v: F.adaptive_max_pool2d(v.mT, 1), [], "adaptive_max_pool2d at .*the last two axes"),
        (lambda v: F.max_pool2d(v.mT, (W, H)), [], "max_pool2d at .*the last two axes"),
        (over_rows(F.prelu), [(H,)], "prelu at .*rows on axis 1"),
        (over_rows(lambda v: F.channel_shuffle(v, 2)), [], "channel_shuffle at .*rows on axis 1"),
        (over_rows(lambda v: F.group_norm(v, 2)), [], "group_norm at .*axis 0 or 1"),
        (lambda v: F.group_norm(v[0], 2), [], "group_norm at .*axis 0 or 1"),
        (lambda v: _antialiased(v.mean((2, 3), keepdim=True)), [], "_upsample_bilinear2d_aa at .*no rule"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(
    function: Callable[..., Tensor], held: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        flows(trace(Between(function, *held).eval(), (2, H, W)))


def _antialiased(pooled: Tensor) -> Tensor:
    return F.interpolate(pooled, size=(H, W), mode="bilinear", antialias=True)


def test_a_column_spread_over_others_leaves_no_tile_exact() -> None:
    traced = trace(Between(lambda v: v + v[..., :1]), (2, H, W))
    assert "add at the top level needs whole rows" in geometry(traced).inexact
