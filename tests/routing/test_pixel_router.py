"""A gate that selects pixels, against the refining network over the whole image."""

import pytest
import torch
from routing_networks import Told, convolutions, convolved_pixels
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import Anneal, Gate, LinearScorer, Threshold
from bigvision.routing import PixelRefiner, PixelRouter, entropy, pixel_statistics, uncertainty

HEIGHT, WIDTH = 9, 12


def uncertain(tau: float) -> Gate:
    return Gate(nn.Identity(), Threshold(tau), normalization="identity", straight=True)


@pytest.fixture(scope="module")
def refiner() -> PixelRefiner:
    torch.manual_seed(0)
    return PixelRefiner(convolutions(2, 3).double().eval(), 2)


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_hard_equals_soft_forward_and_backward(
    refiner: PixelRefiner, straight: bool, dense_above: float
) -> None:
    """Soft: the network everywhere, multiplied by mask x weight."""
    torch.manual_seed(1)
    x = torch.randn(2, 2, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    coarse = torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    told = Told(torch.randn(2 * HEIGHT * WIDTH, 1, dtype=torch.float64) - 0.8)
    gate = Gate(told, Threshold(0.5), normalization="sigmoid", straight=straight)
    refiner.dense_above = dense_above
    wanted = [x, coarse, told.logits, *refiner.parameters()]
    loss = torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64)

    hard = PixelRouter(gate, refiner)(x, coarse)
    probs = told.logits.sigmoid().view(2, 1, HEIGHT, WIDTH)
    mask = (probs >= 0.5).double()
    weight = mask + mask * (probs - probs.detach()) if straight else mask * probs
    soft = coarse + weight * (refiner.network(x) - coarse)
    assert 20 < mask.sum() < mask.numel() / 2
    torch.testing.assert_close(hard, soft, rtol=0, atol=1e-12)
    found = torch.autograd.grad((hard * loss).sum(), wanted)
    expected = torch.autograd.grad((soft * loss).sum(), wanted)
    assert found[2].count_nonzero() == mask.sum()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_pixels_above_an_uncertainty_are_refined_and_no_others(refiner: PixelRefiner) -> None:
    x = torch.randn(2, 2, HEIGHT, WIDTH, dtype=torch.float64)
    coarse = 2 * torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    allowed = torch.rand(2, HEIGHT, WIDTH) > 0.3
    router = PixelRouter(uncertain(0.7), refiner)
    mask = (entropy(coarse) >= 0.7) & allowed
    assert 0 < mask.sum() < allowed.sum()
    decision = router.decide(x, coarse, allowed=allowed)
    assert torch.equal(decision.chosen(0), mask)
    with torch.no_grad():
        assert torch.equal(router.compute(x, coarse, decision), refiner(x, coarse, mask))
        assert torch.equal(router(x, coarse, allowed=allowed), refiner(x, coarse, mask))
        assert torch.equal(PixelRouter(uncertain(1.1), refiner)(x, coarse), coarse)


def scene(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [B, 2, 16, 16] and classes, which on the left the pixel tells, on the right its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 2, 16, 16, generator=generator).sign()
    x[:, 1, :, :8], x[:, 0, :, 8:] = 0, 0
    around = functional.conv2d(x[:, 1:], torch.ones(1, 1, 3, 3), padding=1)[:, 0] - x[:, 1]
    return x, torch.where(x[:, 1] == 0, x[:, 0] > 0, around > 0).long()


def test_gate_coarse_and_refining_network_train_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    coarse = nn.Conv2d(2, 2, 1)
    network = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    # All pixels at first, so that the gate sees what refining is worth before it is strict.
    warm = 60
    gate = Gate(LinearScorer(1, 1, bias=True), Threshold(Anneal(0.0, 0.5, warm)), normalization="sigmoid")
    nn.init.zeros_(gate.scorer.weight)
    router = PixelRouter(gate, PixelRefiner(network, 2, dense_above=1.0))
    optimizer = torch.optim.Adam([*coarse.parameters(), *router.parameters()], 0.05)
    x, label = scene(8, seed=1)
    losses = []
    for step in range(100):
        first = coarse(x)
        decision = router.decide(x, first)
        task = functional.cross_entropy(router.compute(x, first, decision), label)
        alone = functional.cross_entropy(first, label)  # the coarse network learns where it is replaced, too
        optimizer.zero_grad()
        (task + alone + 0.3 * router.budget_loss(decision, Anneal(1.0, 0.5, warm).at(step))).backward()
        for part in (gate, coarse, network):
            assert all(p.grad is not None and p.grad.any() for p in part.parameters())
        optimizer.step()
        gate.advance()
        losses.append(task.item())
    assert losses[-1] < 0.1 * losses[0]
    x, label = scene(4, seed=2)
    router.eval()
    with torch.no_grad():
        first = coarse(x)
        decision = router.decide(x, first)
        refined = decision.chosen(0)
        assert refined[..., 8:].float().mean() > 0.9 and refined[..., :8].float().mean() < 0.1
        router.compute(x, first, decision)  # traced at this size
        pixels = convolved_pixels(monkeypatch)
        y = router.compute(x, first, decision)
    assert sum(pixels) == 2 * int(refined.sum())  # both layers gave the selected pixels alone
    assert (y.argmax(1) == label).float().mean() > 0.95
    assert (first.argmax(1) == label).float().mean() < 0.85


def test_features_have_no_gradient_of_their_own() -> None:
    x, coarse = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 3, 4, requires_grad=True)
    assert uncertainty(x, coarse).shape == (1, 1, 3, 4)
    assert pixel_statistics(x, coarse).shape == (1, 4, 3, 4)
    assert not uncertainty(x, coarse).requires_grad and not pixel_statistics(x, coarse).requires_grad


def test_what_does_not_fit_is_refused(refiner: PixelRefiner) -> None:
    x, coarse = torch.randn(1, 2, 4, 4).double(), torch.randn(1, 3, 4, 4).double()
    with pytest.raises(ValueError, match=r"for 3 features and 1 experts, the pixels have 1 features"):
        PixelRouter(Gate(LinearScorer(3, 1)), refiner)
    with pytest.raises(ValueError, match=r"for 3 features and 1 experts, the pixels have 4 features"):
        PixelRouter(Gate(LinearScorer(3, 1)), refiner, features=pixel_statistics)
    with pytest.raises(ValueError, match=r"1 features and 2 experts.*1 experts \('refine',\)"):
        PixelRouter(Gate(LinearScorer(1, 2)), refiner)
    with pytest.raises(ValueError, match="for 2 experts, pixels have one"):
        PixelRouter(Gate(Told(torch.zeros(16, 2))), refiner).decide(x, coarse)
    router = PixelRouter(uncertain(0.5), refiner)
    with pytest.raises(ValueError, match=r"\[1, 4, 4\].*\[1, 4, 3\]"):
        router(x, coarse, allowed=torch.ones(1, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[B, 2, H, W\].*\[1, 3, 4, 4\]"):
        router(coarse, coarse)
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 2, 8\].*\[1, 4, 4\]"):
        router.compute(x.view(1, 2, 2, 8), coarse.view(1, 3, 2, 8), router.decide(x, coarse))
    with pytest.raises(ValueError, match=r"0\.\.1.*1\.5"):
        router.budget_loss(router.decide(x, coarse), 1.5)
