"""psi and its slopes: values by hand, monotonicity beyond the turning point, derivatives by autograd."""

from math import cos, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads import Margin
from heads.margin import target_logit

ANGLES = torch.linspace(1e-3, pi - 1e-3, 400, dtype=torch.float64)


def test_values_by_hand() -> None:
    t = torch.tensor([cos(0.4), cos(2.9)], dtype=torch.float64)
    arcface = target_logit(t, 1.0, 0.5, 0.0).psi
    # 0.4 + 0.5 is before pi; 2.9 + 0.5 = 3.4 is beyond it, where the curve goes on as -cos(3.4) - 2.
    torch.testing.assert_close(arcface, torch.tensor([cos(0.9), -cos(3.4) - 2], dtype=torch.float64))
    cosface = target_logit(t, 1.0, 0.0, 0.35)
    torch.testing.assert_close(cosface.psi, t - 0.35)
    assert cosface.d_cosine.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_sphereface_is_its_papers_piecewise_formula(m: int) -> None:
    k = torch.floor(m * ANGLES / pi)
    expected = (-1) ** k * torch.cos(m * ANGLES) - 2 * k
    torch.testing.assert_close(target_logit(torch.cos(ANGLES), float(m), 0.0, 0.0).psi, expected)


@given(m1=st.floats(0.5, 5), m2=st.floats(0, 1.5), m3=st.floats(0, 0.6))
def test_falls_with_the_angle_and_has_the_slope_it_says(m1: float, m2: float, m3: float) -> None:
    t = torch.cos(ANGLES).requires_grad_()
    found = target_logit(t, m1, m2, m3)
    assert (found.psi.diff() <= 1e-12).all()
    margins = torch.tensor([m1, m2, m3], dtype=torch.float64).expand(len(t), 3).clone().requires_grad_()
    psi = target_logit(t, *margins.unbind(1)).psi
    d_t, d_m = torch.autograd.grad(psi.sum(), (t, margins))
    torch.testing.assert_close(found.d_cosine, d_t, rtol=1e-6, atol=1e-6)
    slopes = torch.stack([found.d_m1, found.d_m2, found.d_m3], 1)
    torch.testing.assert_close(slopes, d_m, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("edge", [1.0, -1.0, 1.0 + 1e-9])
def test_finite_at_the_poles(edge: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = target_logit(torch.tensor([edge], dtype=dtype), 1.3, 0.5, 0.0)
        assert torch.isfinite(found.psi).all() and torch.isfinite(found.d_cosine).all()


@pytest.mark.parametrize("bad", [(0.0, 0.5, 0.0), (-1.0, 0.0, 0.0), (1.0, float("nan"), 0.0)])
def test_impossible_margins_are_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"margins must be finite and m1 positive, got"):
        Margin(*bad)
