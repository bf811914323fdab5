"""Windows of a network with padded averages against the whole image."""

import pytest
import torch
from routing_networks import Hourglass, convolutions
from torch import Tensor, nn
from torch.nn import functional

from bigvision.graph.trace import trace
from bigvision.routing.boxes import Box
from bigvision.routing.spans import UnwindowedError, Windows
from bigvision.routing.windowed import WindowedNetwork

SIDES = (21, 17)


class Averages(nn.Module):
    """A tall and a wide average, which pad with zeros and count them (or not), and a strided one."""

    def __init__(self, count_include_pad: bool = True, divisor: int | None = None) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 3, 1)
        self.how = {"count_include_pad": count_include_pad, "divisor_override": divisor}

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)  # a bias: what lies beyond the edge is no image of zeros
        tall = functional.avg_pool2d(y, (7, 1), 1, (3, 0), **self.how)
        wide = functional.avg_pool2d(tall, (1, 5), 1, (0, 2), **self.how)
        return functional.avg_pool2d(wide, 3, 1, 1, **self.how)


def windowed(module: nn.Module) -> WindowedNetwork:
    return WindowedNetwork(module, trace(module, (2, *SIDES)))


@pytest.mark.parametrize("divisor", [None, 4])
@pytest.mark.parametrize(
    "box", [Box(0, 0, 4, 5), Box(8, 6, 12, 10), Box(17, 13, 21, 17), Box(0, 0, 21, 17), Box(9, 0, 10, 17)]
)
def test_a_window_of_padded_averages_is_cut_from_the_whole(box: Box, divisor: int | None) -> None:
    torch.manual_seed(0)
    module, x = Averages(divisor=divisor).eval(), torch.randn(1, 2, *SIDES)
    network = windowed(module)
    rows, cols = network.intervals(box)
    with torch.inference_mode():
        found = network(x[..., rows.start : rows.stop, cols.start : cols.stop], rows.cuts, cols.cuts)
        whole = module(x)[..., box.top : box.bottom, box.left : box.right]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def test_averages_over_fewer_pixels_at_the_edge_have_no_window_rule() -> None:
    with pytest.raises(UnwindowedError, match="avg_pool2d"):
        windowed(Averages(count_include_pad=False).eval())


@pytest.mark.parametrize("module", [convolutions(2, 3), Hourglass(2, 3), nn.Upsample(scale_factor=2)])
@pytest.mark.parametrize("size", [(16, 24), (96, 136)])
def test_intervals_that_recur_are_those_of_their_place(module: nn.Module, size: tuple[int, int]) -> None:
    windows = Windows(trace(module.eval(), (2, *size)))
    draw = torch.Generator().manual_seed(0)
    for axis, length in enumerate(windows.output.meta["val"].shape[-2:]):
        for _ in range(60):
            a, b = torch.randint(0, length + 1, (2,), generator=draw).sort().values.tolist()
            if a < b:
                found, expected = windows.interval(axis, a, b), windows._trace_back(axis, a, b)
                assert (found.start, found.stop) == (expected.start, expected.stop)
                assert found.cuts is expected.cuts  # alike, so that they run as one batch


def test_far_from_edges_intervals_are_traced_once() -> None:
    windows = Windows(trace(Hourglass(2, 3).eval(), (2, 256, 256)))
    cuts = {id(windows.interval(0, row, row + 16).cuts) for row in range(48, 192, 8)}
    assert len(cuts) == len(windows._kinds) == 1


class Halves(nn.Module):
    """Two halves of the channels, of which one reads farther than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        far, near = self.mix(x).chunk(2, 1)
        return functional.avg_pool2d(far, 5, 1, 2) + near * far


@pytest.mark.parametrize("box", [Box(0, 0, 4, 5), Box(8, 6, 12, 10), Box(17, 13, 21, 17)])
def test_a_window_of_an_operator_with_several_results(box: Box) -> None:
    torch.manual_seed(0)
    module, x = Halves().eval(), torch.randn(1, 2, *SIDES)
    network = windowed(module)
    rows, cols = network.intervals(box)
    with torch.inference_mode():
        found = network(x[..., rows.start : rows.stop, cols.start : cols.stop], rows.cuts, cols.cuts)
        whole = module(x)[..., box.top : box.bottom, box.left : box.right]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
