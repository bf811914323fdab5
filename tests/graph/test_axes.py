"""Which rows an output row reads, against the real operators with one input row made NaN."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigvision.graph import UnsupportedOperatorError, flows, trace
from bigvision.graph.axes import AxisMap


def reads(model: nn.Module, height: int) -> np.ndarray:
    """bool [n_out, n_in]: which output rows turn NaN with each input row."""
    columns = []
    for row in range(height):
        image = torch.rand(1, 1, height, 9, dtype=torch.float64) + 1
        image[:, :, row] = torch.nan
        columns.append(model(image).isnan().any(-1).any(1)[0].numpy())
    return np.stack(columns, 1)


def check(model: nn.Module, height: int) -> None:
    model.double().eval()
    traced = trace(model, (1, height, 9))
    (node,) = traced.operators()
    rows = flows(traced)[node].rows
    assert rows is not None
    with torch.no_grad():
        seen = reads(model, height)
    assert (rows.size_in, rows.size_out) == (height, len(seen))
    for i, row in enumerate(seen):
        (at,) = np.nonzero(row)
        assert all(rows.first[i] <= at) and all(at <= rows.last[i])
    assert_never_turns_back(rows)


def assert_never_turns_back(rows: AxisMap) -> None:
    assert (np.diff(rows.first) >= 0).all() and (np.diff(rows.last) >= 0).all()
    for available in range(rows.size_in + 1):
        ready = rows.ready(available)
        assert ready == rows.size_out or rows.last[ready] >= available
        assert ready == 0 or available == rows.size_in or rows.last[ready - 1] < available


class Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.precision = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


def operator(draw: random.Random) -> nn.Module:
    k, s, d = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 3)
    p = draw.randint(0, 3)
    edge = draw.choice(["reflect", "replicate"])
    mode = draw.choice(["nearest", "nearest-exact", "bilinear", "bicubic"])
    size = (draw.randint(1, 30), 9)
    align = draw.random() < 0.5 if mode[0] == "b" else None
    return draw.choice(
        [
            nn.Conv2d(1, 1, (k, 1), (s, 1), (p, 0), (d, 1)),
            nn.ConvTranspose2d(1, 1, (k, 1), (s, 1), (0, 0), (0, 0), dilation=(d, 1)),
            nn.MaxPool2d((k, 1), (s, 1), (k // 2, 0), ceil_mode=draw.random() < 0.5),
            nn.AvgPool2d((k, 1), (s, 1), (k // 2, 0), ceil_mode=draw.random() < 0.5),
            Function(lambda x: F.pad(x, (0, 0, p, s), edge)),
            Function(lambda x: F.interpolate(x, size, mode=mode, align_corners=align)),
            Function(lambda x: x[:, :, p :: s + 1]),
            Function(lambda x: F.adaptive_avg_pool2d(x, (max(size[0], 2), 9))),
        ]
    )


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(6, 24))
def test_no_row_is_read_that_the_map_leaves_out(seed: int, height: int) -> None:
    torch.manual_seed(seed)
    model = operator(random.Random(seed))
    try:
        model.double()(torch.rand(1, 1, height, 9, dtype=torch.float64))
    except RuntimeError:  # a kernel larger than the image
        return
    check(model, height)


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        (nn.Conv2d(1, 1, 3, 2, 1, 2), [-1, 1], [3, 5]),
        (nn.ConvTranspose2d(1, 1, (2, 1), (2, 1)), [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]),
        (nn.MaxPool2d(3, 2, 1), [-1, 1], [1, 3]),
        (nn.PixelUnshuffle(3), [0], [2]),
    ],
)
def test_maps_by_hand(model: nn.Module, first: list[int], last: list[int]) -> None:
    height = {1: 3, 2: 4, 6: 3}[len(first)] + (1 if isinstance(model, nn.Conv2d) else 0)
    traced = trace(model, (1, height, 9))
    (node,) = traced.operators()
    rows = flows(traced)[node].rows
    assert rows is not None
    assert (rows.first.tolist()[: len(first)], rows.last.tolist()[: len(last)]) == (first, last)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(2).softmax(-1), "merges rows with another axis"),
        (lambda x: x @ x.mT, "different axes"),
        (lambda x: torch.einsum("nchw,ncij->nhwij", x, x).sum(-1), "einsum|bmm|different axes|merges rows"),
        (lambda x: x.softmax(2), "softmax at the top level .*works along the rows"),
        (lambda x: torch.roll(x, 1, 2), "roll at the top level .*no rule for rows"),
        (lambda x: F.pad(x, (1, 1, 1, 1), "circular"), "last rows first|no rule"),
        (lambda x: x[:, :, 0], "one row of the image"),
        (lambda x: x.median(2).values, "median"),
        (lambda x: F.conv2d(x[0], torch.ones(1, 2, 3, 3)), "without the axis of the batch"),
        (lambda x: F.conv_transpose2d(x[0], torch.ones(2, 1, 3, 3)), "without the axis of the batch"),
    ],
)
def test_operators_without_a_rule_are_named(function: object, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        flows(trace(Function(function), (2, 9, 9)))
