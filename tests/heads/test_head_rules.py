"""Besides the arithmetic: modes, adaptive margins, order of backwards, settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from heads import SGD, AdaFace, MagFace, Margin, ShardedMarginHead, clustered, sampled

Oracle = Callable[..., Tensor]


def make(**settings: Any) -> ShardedMarginHead:
    defaults = {"margin": Margin(1.0, 0.3, 0.0), "scale": 16.0, "storage": "float64", "optimizer": SGD(0.1)}
    return ShardedMarginHead(29, 5, tile=8, **(defaults | settings))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(8, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(0, 29, (8,), generator=generator)


@pytest.mark.parametrize("margin", [MagFace(2.0, 12.0, 0.2, 0.9), AdaFace(0.4)])
def test_adaptive_margins_and_their_gradient(reference: Oracle, margin: Any) -> None:
    head = make(margin=margin)
    x, y = batch()
    x2 = x.detach().clone().requires_grad_()
    w = head.full_centers().requires_grad_()
    loss = head(x, y)
    if isinstance(margin, AdaFace):
        margin.eval()  # the same statistics again
    m1, m2, m3, *penalty = margin(x2.norm(dim=1))
    expected = reference(x2, y, w, (m1, m2, m3), 16.0) + sum(p.mean() for p in penalty)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-10, atol=1e-12)
    radial = (x.grad * x.detach()).sum(1).abs().max()
    assert (radial > 1e-3) == isinstance(margin, MagFace)  # only MagFace pulls at the norm


def test_adaface_follows_the_norms_only_while_it_trains() -> None:
    head = make(margin=AdaFace(momentum=0.5))
    x, y = batch()
    head.eval()(x, y)
    assert float(head.margin.mean) == 20.0
    head.train()(x, y)
    assert float(head.margin.mean) == pytest.approx((20.0 + float(x.detach().norm(dim=1).mean())) / 2)
    m1, m2, m3 = head.eval().margin(torch.tensor([1e-9, 1e9], dtype=torch.float64))
    assert (
        m1 == 1.0 and m2[0] > m2[1] and m3[0] < m3[1]
    )  # blurred images keep the angle, sharp ones add to it


def test_evaluation_is_the_full_softmax_and_moves_nothing(reference: Oracle) -> None:
    head = make(active=sampled(0.2)).eval()
    x, y = batch()
    x2 = x.detach().clone().requires_grad_()
    before = head.full_centers()
    loss, expected = head(x, y), reference(x2, y, before, (1.0, 0.3, 0.0), 16.0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(x.grad, x2.grad)
    assert torch.equal(head.full_centers(), before) and head.step == 0


def test_a_frozen_backbone_still_trains_the_head() -> None:
    head, (x, y) = make(), batch()
    before = head.full_centers()
    head(x.detach(), y).backward()
    assert not torch.equal(head.full_centers(), before)


def test_a_loss_from_before_the_centres_moved_is_refused() -> None:
    head, (x, y) = make(), batch()
    first, second = head(x, y), head(x, y)
    first.backward()
    with pytest.raises(RuntimeError, match="the centres have moved since this loss was computed"):
        second.backward()


def test_the_incoming_gradient_scales_the_step_and_the_features() -> None:
    one, half, (x, y) = make(), make(), batch()
    x2 = x.detach().clone().requires_grad_()
    start = one.full_centers()
    one(x, y).backward()
    (half(x2, y) / 2).backward()
    torch.testing.assert_close(x2.grad * 2, x.grad)
    torch.testing.assert_close((half.full_centers() - start) * 2, one.full_centers() - start)


def test_centres_can_be_imported(tmp_path: Path) -> None:
    w = torch.randn(29, 5, dtype=torch.float64)
    save_file({"centres": w}, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        for centers in (w, file.get_slice("centres")):
            head = make(active=clustered(3))
            head.set_centers(centers)
            assert torch.equal(head.full_centers(), w)
            angle = torch.arccos((F.normalize(w) * head.gate.centroids[head.gate.assignment.long()]).sum(1))
            assert (angle <= head.gate.radius[head.gate.assignment.long()]).all()
    with pytest.raises(ValueError, match=r"setting the centres: centres must be \(29, 5\), got \(28, 5\)"):
        head.set_centers(w[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_mixed_precision_get_gradients_of_their_own_kind(dtype: torch.dtype) -> None:
    head, (x, y) = make(storage="float32"), batch()
    x = x.detach().to(dtype).requires_grad_()
    loss = head(x, y)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"storage": "float16"}, "storage must be one of float64, float32, bfloat16, got 'float16'"),
        ({"scale": 0.0}, "dim, tile and scale must be positive"),
        ({"normalized": False}, "normalized=False takes none, got Margin"),
        ({"optimizer": None, "place": "host"}, "an ordinary parameter lives on the device"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make(**settings)
