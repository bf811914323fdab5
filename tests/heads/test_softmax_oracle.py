"""Loss, feature gradient and updated centres against the unsharded float64 autograd oracle, on one rank."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads import SGD, Margin, ShardedMarginHead

Oracle = Callable[..., Tensor]
MARGINS = [
    (1.0, 0.5, 0.0),
    (1.0, 0.0, 0.35),
    (1.35, 0.0, 0.0),
    (4.0, 0.0, 0.0),
    (1.2, 0.3, 0.1),
    (1.0, 0.0, 0.0),
]


def batch(b: int, d: int, c: int, step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(b, d, dtype=torch.float64, generator=g).to(dtype) * 3
    return x.requires_grad_(), torch.randint(-1, c, (b,), generator=g)


def step_both(
    head: ShardedMarginHead, oracle: Oracle, w: Tensor, optimizer: torch.optim.Optimizer, step: int
) -> tuple[float, float, float]:
    """One step of each; the absolute differences of loss, feature gradient and centres."""
    x, y = batch(9, head.dim, head.num_classes, step)
    loss = head(x, y)
    loss.backward()
    x2 = x.detach().clone().requires_grad_()
    m = head.margin
    expected = oracle(x2, y, w, (m.m1, m.m2, m.m3), head.scale)
    optimizer.zero_grad()
    expected.backward()
    optimizer.step()
    differences = (loss - expected, x.grad - x2.grad, head.full_centers() - w)
    return tuple(float(d.detach().abs().max()) for d in differences)


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_float64_steps_equal_the_oracle(reference: Oracle, margins: tuple, tile: int) -> None:
    rule = SGD(0.1, momentum=0.9, weight_decay=5e-4)
    head = ShardedMarginHead(37, 6, Margin(*margins), 16.0, storage="float64", optimizer=rule, tile=tile)
    w = head.full_centers().requires_grad_()
    plain = torch.optim.SGD([w], 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        assert max(step_both(head, reference, w, plain, step)) < 1e-10


@settings(max_examples=25, deadline=None)
@given(
    c=st.integers(1, 40),
    d=st.integers(1, 9),
    b=st.integers(0, 6),
    tile=st.integers(1, 41),
    scale=st.floats(1, 400),
)
def test_any_shape_and_scale(reference: Oracle, c: int, d: int, b: int, tile: int, scale: float) -> None:
    head = ShardedMarginHead(
        c, d, Margin(1.0, 0.3, 0.1), scale, storage="float64", optimizer=SGD(0.1), tile=tile
    )
    w = head.full_centers().requires_grad_()
    x, y = batch(b, d, c)
    x2 = x.detach().clone().requires_grad_()
    loss, expected = head(x, y), reference(x2, y, w, (1.0, 0.3, 0.1), scale)
    loss.backward()
    expected.backward()
    # acos turns a cosine's last digit, near 1, into the angle's eighth (D = 1 makes every cosine +-1).
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10 if d > 1 else 2e-8 * scale)
    if d > 1:
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(head.full_centers(), w.detach() - 0.1 * w.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_centres_multiplied_natively_or_widened(
    reference: Oracle, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widened to float32, the products of bfloat16 centres err by float32's rounding, not by bfloat16's."""
    monkeypatch.setattr("heads.shard.has_fast_bfloat16", lambda device: native)
    head = ShardedMarginHead(
        37, 6, Margin(1.0, 0.5, 0.0), 16.0, storage="bfloat16", optimizer=SGD(0.1), tile=7
    )
    w = head.full_centers().double().requires_grad_()
    x, y = batch(9, 6, 37, dtype=torch.float32)
    loss = head(x, y)
    loss.backward()
    x2 = x.detach().double().requires_grad_()
    expected = reference(x2, y, w, (1.0, 0.5, 0.0), 16.0)
    expected.backward()
    bound = 16.0 * 2**-8 if native else 1e-5  # a cosine's rounding, times the scale
    assert abs(float(loss.detach() - expected.detach())) < bound * float(expected.detach())
    assert (x.grad - x2.grad).abs().max() < bound * x2.grad.abs().max()
    moved = (w - 0.1 * w.grad).detach()
    stored = 2**-8 * (2 if native else 1)  # its own rounding, after the gradient's
    assert (head.full_centers().double() - moved).abs().max() < stored * moved.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(0, 6),
    tile=st.integers(1, 24),
    scale=st.floats(0.1, 20),
    long=st.floats(1e-3, 1e3),
    far=st.floats(1e-3, 30),
)
def test_the_plain_softmax_takes_centres_and_features_of_any_length(
    reference: Oracle, b: int, tile: int, scale: float, long: float, far: float
) -> None:
    """x.w is no cosine: nothing keeps it within [-1, 1], neither the own logit nor another's."""
    head = ShardedMarginHead(
        23,
        5,
        scale=scale,
        normalized=False,
        storage="float64",
        optimizer=SGD(1e-3),
        tile=tile,
        init_std=far,
    )
    w = head.full_centers().requires_grad_()
    x, y = batch(b, 5, 23)
    x = (x.detach() * long).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    loss, expected = head(x, y), reference(x2, y, w, (1.0, 0.0, 0.0), scale, normalized=False)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-12 * scale * far)
    torch.testing.assert_close(head.full_centers(), w.detach() - 1e-3 * w.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_plain_softmax_of_long_features_in_single_precision(reference: Oracle, storage: str) -> None:
    head = ShardedMarginHead(
        23, 5, scale=1.0, normalized=False, storage=storage, optimizer=SGD(0.0), init_std=3.0
    )
    w = head.full_centers().double()
    x, y = batch(9, 5, 23, dtype=torch.float32)
    expected = reference(x.detach().double(), y, w, (1.0, 0.0, 0.0), 1.0, normalized=False)
    bound = 1e-5 if storage == "float32" else 2e-2
    assert float(head(x, y).detach()) == pytest.approx(float(expected), rel=bound)
