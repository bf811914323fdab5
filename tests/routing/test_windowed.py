"""Windows of a network with padded averages against the whole image."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.graph.trace import trace
from bigvision.routing.boxes import Box
from bigvision.routing.spans import UnwindowedError
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
