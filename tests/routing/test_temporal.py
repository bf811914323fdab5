"""Revisits: bit for bit what recomputing everything gives, from a fraction of the work."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_networks import Hourglass
from torch.nn import functional

from bigvision.routing.temporal import TemporalRouter, Visit, changed_pixels

SIZE = (70, 93)


@pytest.fixture(scope="module")
def router() -> TemporalRouter:
    torch.manual_seed(0)
    return TemporalRouter(Hourglass(2, 3).eval(), 2, 16, made_by="one")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 69), st.integers(0, 92), st.integers(1, 9), st.integers(0, 2**31))
def test_a_changed_patch_recomputes_its_neighbourhood_bit_for_bit(
    router: TemporalRouter, top: int, left: int, side: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2, *SIZE, generator=generator)
    before = router(first).visit
    second = first.clone()
    second[0, top : top + side, left : left + side] += 0.5
    found, everything = router(second, before), router(second).visit
    assert torch.equal(found.visit.output, everything.output)
    # The oracle: regions of which some output pixel differs must have been recomputed.
    differs = (everything.output != before.output).any(0)[None, None].float()
    moved = functional.max_pool2d(differs, 16, ceil_mode=True)[0, 0].bool().numpy()
    assert not (moved & ~found.recomputed).any()
    reach = router.known.shape.halo + router.known.shape.stride
    rows, cols = found.recomputed.nonzero()
    assert (rows * 16 - reach < top + side).all() and ((rows + 1) * 16 + reach > top).all()
    assert (cols * 16 - reach < left + side).all() and ((cols + 1) * 16 + reach > left).all()


def test_an_identical_revisit_computes_nothing(router: TemporalRouter) -> None:
    image = torch.randn(2, *SIZE)
    image[0, 3, 4] = torch.nan
    first = router(image)
    assert first.reused == 0
    again = router(image.clone(), first.visit)
    assert again.reused == 1
    assert torch.equal(again.visit.output.nan_to_num(7), first.visit.output.nan_to_num(7))


def test_results_are_the_dense_network(router: TemporalRouter) -> None:
    image = torch.randn(2, *SIZE)
    padded = functional.pad(image, (0, -SIZE[1] % 8, 0, -SIZE[0] % 8))
    with torch.no_grad():
        dense = router.network(padded[None])[0, :, : SIZE[0], : SIZE[1]]
    assert torch.allclose(router(image).visit.output, dense, atol=1e-5)


def test_work_falls_and_error_grows_with_the_tolerance(router: TemporalRouter) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, *SIZE)
    before = router(image).visit
    later = image + torch.linspace(0, 1, SIZE[1]) * torch.rand(2, *SIZE)
    curve = list(router.curve(later, before, [0.0, 0.1, 0.5, 2.0]))
    shares = [share for _, share, _ in curve]
    assert curve[0][2] == 0 and shares == sorted(shares, reverse=True)
    assert shares[-1] == 0 and curve[-1][2] > 0


def test_bits_tell_at_tolerance_zero() -> None:
    one, other = torch.tensor([[[0.0, torch.nan, 1.0]]]), torch.tensor([[[-0.0, torch.nan, 1.0]]])
    assert changed_pixels(one, other, 0.0).tolist() == [[True, False, False]]
    assert changed_pixels(one, other, 0.1).tolist() == [[False, False, False]]
    big = torch.tensor([[[0, 255]]], dtype=torch.uint8), torch.tensor([[[255, 250]]], dtype=torch.uint8)
    assert changed_pixels(*big, 5).tolist() == [[True, False]]


def test_other_models_grids_and_tolerances_are_refused(router: TemporalRouter) -> None:
    image = torch.randn(2, *SIZE)
    visit = Visit(image, torch.zeros(3, *SIZE), "one")
    with pytest.raises(ValueError, match=r"two.*one"):
        router(image, Visit(image, visit.output, "two"))
    with pytest.raises(ValueError, match=r"\[2, 70, 93\].*\[2, 70, 90\]"):
        router(image[..., :90], visit)
    with pytest.raises(ValueError, match=r"-1"):
        router(image, visit, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        changed_pixels(image, image.double(), 0.0)
    with pytest.raises(ValueError, match=r"\[2, H, W\].*\[1, 70, 93\]"):
        router(image[:1])
    with pytest.raises(ValueError, match=r"12 px.*8 px"):
        TemporalRouter(Hourglass(2, 3), 2, 12, made_by="")
    assert np.isclose(router(image, router(image).visit).reused, 1)
