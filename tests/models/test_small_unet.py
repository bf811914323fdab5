"""The small U-Net: any depth, output at the image's size, strides and halos that the graph can read."""

import pytest
import torch

from bigvision.graph.geometry import geometry
from bigvision.graph.trace import trace
from bigvision.models.small_unet import small_unet


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_output_has_the_image_size_and_tiles_are_exact(depth: int) -> None:
    model = small_unet(in_channels=3, classes=7, width=4, depth=depth).eval()
    side = 3 * 2**depth
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, side, 2 * side)).shape == (2, 7, side, 2 * side)
    found = geometry(trace(model, (3, 256, 256)))
    assert found.stride == 2**depth and not found.inexact
    assert 0 < found.halo <= 8 * 2**depth


def test_every_parameter_learns() -> None:
    model = small_unet(width=4)
    model(torch.randn(1, 4, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="not 4, 0, 16, 3"):
        small_unet(classes=0)
