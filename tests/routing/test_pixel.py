"""Refined pixels against the network over the whole image."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_networks import Hourglass, convolutions, convolved_pixels
from torch import nn

from bigvision.routing.pixel import PixelRefiner, entropy, margin

HEIGHT, WIDTH = 11, 14


@pytest.fixture(scope="module")
def refiner() -> PixelRefiner:
    torch.manual_seed(0)
    return PixelRefiner(convolutions(2, 3).double().eval(), 2)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2), st.floats(0, 1), st.integers(0, 2**31), st.sampled_from([0.0, 1.0]))
def test_selected_pixels_are_the_dense_network_and_others_stay(
    refiner: PixelRefiner, images: int, share: float, seed: int, dense_above: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    coarse = torch.randn(images, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    mask = torch.rand(images, HEIGHT, WIDTH, generator=generator) < share
    refiner.dense_above = dense_above
    with torch.no_grad():
        expected = torch.where(mask[:, None], refiner.network(x), coarse)
        assert torch.allclose(refiner(x, coarse, mask), expected, rtol=0, atol=1e-12)


def test_gradients_reach_image_coarse_result_and_network(refiner: PixelRefiner) -> None:
    x = torch.randn(1, 2, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    coarse = torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, [0, 5, 10], [0, 6, 13]] = True
    wanted = [x, coarse, *refiner.network.parameters()]
    found = []
    for refiner.dense_above in (1.0, 0.0):
        found.append(torch.autograd.grad(refiner(x, coarse, mask).square().sum(), wanted))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("at", [[], [(0, 2, 3)], [(0, 2, 3), (0, 2, 4), (1, 7, 9)]])
def test_only_the_neighbourhoods_of_selected_pixels_are_computed(
    at: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).eval()
    refiner = PixelRefiner(network, 2, dense_above=1.0)
    mask = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    for pixel in at:
        mask[pixel] = True
    x, coarse = torch.randn(2, 2, HEIGHT, WIDTH), torch.randn(2, 3, HEIGHT, WIDTH)
    refiner(x, coarse, mask)  # traced
    made = convolved_pixels(monkeypatch)
    with torch.no_grad():
        refiner(x, coarse, mask)
    # The second layer gives the pixel, the first its 3 x 3 neighbours.
    assert made == ([len(at) * 9, len(at)] if at else [])


def test_pointwise_networks_pay_up_to_a_full_mask_and_halos_only_below() -> None:
    assert PixelRefiner(torch.nn.Conv2d(2, 3, 1), 2).dense_above == 1
    assert PixelRefiner(convolutions(2, 3).eval(), 2).dense_above < 0.5


def test_uncertainty_is_zero_when_sure_and_one_when_not() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 0.0], [0.0, 0.0]])[None, :, None]
    for measure in (entropy, margin):
        assert torch.allclose(measure(logits), torch.tensor([[[0.0, 1.0]]]), atol=1e-6)
        assert torch.allclose(measure(torch.zeros(1, 1, 1, 1)), torch.ones(1, 1, 1))


def test_what_does_not_fit_is_refused(refiner: PixelRefiner) -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"3 channels, got \[1, 2, 4, 4\] and \[1, 2, 4, 4\]"):
        refiner(x, x, torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 4, 4\], got torch.int64 \[1, 4\]"):
        refiner(x, torch.zeros(1, 3, 4, 4).double(), torch.ones(1, 4).long())
    with pytest.raises(ValueError, match=r"1\.5"):
        PixelRefiner(torch.nn.Conv2d(2, 3, 1), 2, dense_above=1.5)
    with pytest.raises(ValueError, match="8"):
        PixelRefiner(Hourglass(2, 3), 2)
