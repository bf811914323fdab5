"""Mixed resolutions against whole maps at each resolution, seams included."""

import pytest
import torch
from mixed_layers import LAYERS
from routing_networks import convolved_pixels
from torch import Tensor, nn
from torch.nn import functional

from bigvision.routing.resolution import MixedResolution


def up(x: Tensor, factor: int) -> Tensor:
    return functional.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def test_all_full_equals_the_layers(mixed: MixedResolution) -> None:
    x = torch.randn(2, 2, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        dense = LAYERS[1](LAYERS[0](x))
        assert torch.allclose(mixed(x, torch.zeros(2, 3, 2).long()), dense, atol=1e-12)


@pytest.mark.parametrize(("level", "factor"), [(1, 2), (2, 4)])
def test_all_at_one_resolution_equals_the_small_image(
    mixed: MixedResolution, level: int, factor: int
) -> None:
    x = torch.randn(1, 2, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        small = LAYERS[1](LAYERS[0](functional.avg_pool2d(x, factor)))
        found = mixed(x, torch.full((1, 2, 3), level))
        assert torch.allclose(found, up(small, factor), atol=1e-12)


def test_a_seam_is_padded_from_the_neighbour_at_the_right_resolution(mixed: MixedResolution) -> None:
    """Left region full, right region half: both padded by hand, layer by layer."""
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        full, half = x, functional.avg_pool2d(x, 2)
        for i, layer in enumerate(LAYERS):
            left, right = layer(full)[..., :8], layer(half)[..., 4:]
            full = torch.cat([left, up(right, 2)], -1)
            half = torch.cat([functional.avg_pool2d(left, 2), right], -1)
            assert i < 2
        assert torch.allclose(mixed(x, torch.tensor([[[0, 1]]])), full, atol=1e-12)


def test_each_region_is_computed_at_its_own_resolution_only(
    mixed: MixedResolution, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 2, 16, 24, dtype=torch.float64)
    level = torch.tensor([[[0, 2, 2], [2, 2, 1]], [[2, 2, 2], [2, 0, 1]]])
    mixed(x, level)  # traced
    made = convolved_pixels(monkeypatch)
    with torch.no_grad():
        mixed(x, level)
    # Regions of 8 x 8 px: two in full, two at half, eight at a quarter; with halos of one layer, no more.
    interior = 2 * 8 * 8 + 2 * 4 * 4 + 8 * 2 * 2
    assert sum(made) == 2 * interior  # two layers


def test_gradients_reach_the_image(mixed: MixedResolution) -> None:
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64, requires_grad=True)
    level = torch.tensor([[[2, 0]]])
    assert torch.autograd.gradcheck(lambda image: mixed(image, level), (x,), fast_mode=True)


def test_what_does_not_fit_is_refused(mixed: MixedResolution) -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        MixedResolution(LAYERS, 8, (2, 1), channels=2)
    with pytest.raises(ValueError, match="6 px"):
        MixedResolution(LAYERS, 6, (1, 4), channels=2)
    with pytest.raises(ValueError, match="stride 2"):
        MixedResolution([nn.Conv2d(2, 3, 3, stride=2, padding=1)], 8, channels=2)
    with pytest.raises(ValueError, match=r"halo of 3 px.*2 px"):
        MixedResolution([nn.Conv2d(2, 3, 7, padding=3)], 8, channels=2)
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[1, 1, 2\].*\[1, 2, 2\]"):
        mixed(x, torch.zeros(1, 2, 2).long())
    with pytest.raises(ValueError, match=r"0\.\.2.*3"):
        mixed(x, torch.full((1, 1, 2), 3))
