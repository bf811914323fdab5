"""Stride and halo by NaN propagation, against networks whose geometry is known by hand."""

import pytest
import torch
from torch import Tensor, nn

from bigvision.graph.probe import Probed, probe


class ReplacesNan(nn.Module):
    """What NaN can't show, a perturbation does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.nan_to_num(x, 0.0))


class Hides(nn.Module):
    """A value deep below a ReLU and a maximum still counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.conv(x).relu(), torch.full((), 1e6))


@pytest.mark.parametrize(
    ("model", "stride", "halo"),
    [
        (nn.Conv2d(2, 3, 1), 1, 0),
        (nn.Conv2d(2, 3, 7, padding=3), 1, 3),
        (nn.Conv2d(2, 3, 3, padding=4, dilation=4), 1, 4),
        (nn.Conv2d(2, 3, (1, 5), padding=(0, 2)), 1, 2),
        (nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)), 2, 0),
        (nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)), 2, 2),
        (nn.Sequential(nn.Conv2d(2, 16, 4, stride=4), nn.PixelShuffle(4)), 4, 0),
        (nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=4, mode="bilinear")), 4, 4),
        (ReplacesNan(), 1, 2),
        (Hides(), 1, 1),
    ],
    ids=[
        "1x1",
        "7x7",
        "dilated",
        "wide",
        "pooled",
        "strided",
        "shuffled",
        "bilinear",
        "replaces NaN",
        "hides",
    ],
)
def test_known_geometries(model: nn.Module, stride: int, halo: int) -> None:
    torch.manual_seed(0)
    assert probe(model.eval(), 2) == Probed(stride, halo, ())


def test_what_needs_the_whole_image_has_a_reason() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean((2, 3), keepdim=True)

    assert probe(Pooled(), 2).inexact


def test_an_output_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="pixels into"):
        probe(nn.Conv2d(2, 3, 3), 2)
