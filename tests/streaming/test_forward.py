"""Streamed rows equal the whole image's, for random networks, sizes and rows per step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from forward_oracle import error, in_place, restored, settled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_graphs import BLOCKS, Choice, RandomGraph
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bigvision.graph import TracedGraph, fold_batch_norm, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.compiled import compiled
from bigvision.streaming.program import Boundary, Program, compile_program
from bigvision.streaming.spill import frontier

EXACT = 1e-10
SINGLE = 1e-5  # where the network itself computes something in single precision


def at_every_pass(program: Program) -> Program:
    """The program with its values kept at the end of every pass but the last."""
    ends = (Boundary(b, frontier(program, b)) for b in range(program.depth - 1))
    return replace(program, boundaries=tuple(end for end in ends if end.values))


def in_double(traced: TracedGraph) -> bool:
    """Whether nothing in the graph is computed in less than double precision."""
    values = [leaf for node in traced.operators() for leaf in pytree.tree_leaves(node.meta["val"])]
    return all(leaf.dtype == torch.float64 or not leaf.is_floating_point() for leaf in values)


def streamed_equals_whole(seed: int, choices: Sequence[Choice] = BLOCKS) -> bool:
    """One random network of a random size: step by step, folded, merged, and with values spilled.

    False where it has no result to compare with.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def size() -> int:
        return draw.choice([1, 2, 3, 5, *[draw.randint(4, 33) for _ in range(3)]])

    shape = (draw.randint(1, 4), size(), size())
    model = RandomGraph(draw, shape, draw.randint(1, 7), choices).double().eval()
    image = torch.randn(shape, dtype=torch.float64)
    program = compile_program(trace(model, shape))
    folded = compile_program(fold_batch_norm(program.traced))
    rows = [draw.randint(1, shape[1]) for _ in range(2)]
    exact = EXACT if in_double(program.traced) else SINGLE
    with torch.no_grad():
        whole = model(image[None])
        if not torch.isfinite(whole).all() or not settled(model, image, whole, exact / 10):
            return False
        assert error(in_place(program, image, rows[0]), whole) <= exact
        assert error(in_place(folded, image, rows[1]), whole) <= exact
        merged = replace(folded, lower=compiled)
        assert error(in_place(merged, image, rows[0]), whole) <= exact
        assert error(restored(program, image, rows[1]), whole) <= exact
        if program.depth > 1:
            with TemporaryDirectory() as scratch:
                spilled = at_every_pass(folded)
                assert error(in_place(spilled, image, rows[0], Path(scratch)), whole) <= exact
                spilled = replace(spilled, lower=compiled)
                assert error(in_place(spilled, image, rows[1], Path(scratch)), whole) <= exact
                assert not list(Path(scratch).iterdir()), "rows are left behind"
    return True


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
@example(114)  # a transposed convolution with rows that no input row reaches
@example(145)  # a last pass that reads no image row
@example(2076)  # output rows that are a view of a line buffer
@example(1093)  # a statistic of a spread statistic
@example(40_273)  # a classifier of a map of one pixel
@example(1_448_613_496)  # a crop, a view of a line buffer, that waits for the deep branch
@example(4_000_506)  # a source row that is a tie but for the precision of its index
@example(500_121)  # one pixel: any axis of one could be its row
def test_random_networks(seed: int) -> None:
    streamed_equals_whole(seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_very_many_random_networks(seed: int) -> None:
    streamed_equals_whole(seed)


class Small(nn.Module):
    """Stride 4, a skip, a global statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 4, 1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        deep = self.down(x)
        deep = deep * deep.mean((2, 3), keepdim=True).sigmoid()
        return self.last(torch.cat([x, F.interpolate(deep, scale_factor=4, mode="bilinear")], 1))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 13, 7), (2, 16, 8), (2, 33, 1)])
def test_scenes_are_padded_to_the_stride_and_cropped(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    image = torch.randn(shape, dtype=torch.float64)
    streamed = StreamedModel(model, shape, rows=3, dtype=torch.float64)
    _, height, width = shape
    with torch.no_grad():
        whole = model(F.pad(image, (0, -width % 4, 0, -height % 4))[None])[..., :height, :width]
        assert streamed.stride == 4
        assert error(streamed(image), whole) <= EXACT
        following = 0
        for row, y in streamed.stream(image):
            assert row == following
            following += y.shape[-2]
    assert following == height


class Arranged(Small):
    """The same with its output's axes in another order, or without channels."""

    def __init__(self, order: tuple[int, ...] | None) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.mean(1) if self.order is None else y.permute(self.order)


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1), (0, 1, 3, 2), (0, 3, 1, 2), (2, 0, 1, 3)])
def test_rows_are_gathered_on_whichever_axis_they_are(order: tuple[int, ...] | None) -> None:
    model, shape = Arranged(order).double(), (2, 17, 9)
    image = torch.randn(shape, dtype=torch.float64)
    padded = F.pad(image, (0, -9 % 4, 0, -17 % 4))
    streamed = StreamedModel(model, shape, rows=3, dtype=torch.float64)(image)
    with torch.no_grad():
        whole = Small.forward(model, padded[None])[..., :17, :9]
    assert error(streamed, whole.mean(1) if order is None else whole.permute(order)) <= EXACT


def test_channels_as_many_as_columns_are_not_cropped_for_them() -> None:
    class ChannelsLast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1)

    model = ChannelsLast(nn.Conv2d(3, 4, 2, 2), nn.Upsample(scale_factor=2), nn.Conv2d(4, 20, 3, padding=1))
    streamed = StreamedModel(model, (3, 23, 19), rows=5)(torch.randn(3, 23, 19))
    assert streamed.shape == (1, 23, 19, 20)


def test_a_source_of_another_shape_or_that_fails_is_named() -> None:
    class Fails:
        shape = (2, 16, 8)

        def __getitem__(self, key: object) -> Tensor:
            raise OSError("disk on fire")

    class Shrinks(Fails):
        def __getitem__(self, key: object) -> Tensor:
            return torch.zeros(2, 1, 8)

    streamed = StreamedModel(Small(), (2, 16, 8), rows=4)
    with pytest.raises(ValueError, match=r"\(2, 15, 8\).*\(2, 16, 8\)"):
        streamed(torch.zeros(2, 15, 8))
    with pytest.raises(RuntimeError, match=r"rows 0\.\.4 .*disk on fire"):
        streamed(Fails())
    with pytest.raises(ValueError, match=r"rows 0\.\.4 .*did its shape change"):
        streamed(Shrinks())


class CroppedSpread(nn.Module):
    """A global statistic spread over more rows than are read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        spread = F.interpolate(F.adaptive_avg_pool2d(x, 1), size=(height + 5, width), mode="bilinear")
        return self.conv(x) + spread[:, :, :height]


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_rows_of_a_spread_statistic_that_nobody_reads(rows: int) -> None:
    model, image = CroppedSpread().double().eval(), torch.randn(2, 11, 6, dtype=torch.float64)
    program = compile_program(trace(model, (2, 11, 6)))
    with torch.no_grad():
        whole = model(image[None])
        assert error(in_place(program, image, rows), whole) <= EXACT
        assert error(restored(program, image, rows), whole) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, image = Small().eval(), torch.randn(2, 32, 24)
    with torch.no_grad():
        whole = model(image[None])
        found = StreamedModel(model, (2, 32, 24), rows=5, dtype=dtype)(image)
    assert found.dtype == dtype
    assert error(found.float(), whole) < (1e-5 if dtype == torch.float32 else 3e-2)
