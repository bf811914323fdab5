"""A gate that selects resolutions, against whole maps at every resolution and loops over regions."""

import itertools

import pytest
import torch
from mixed_layers import FACTORS, LAYERS, REGION
from routing_networks import Told, convolved_pixels
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import Anneal, Gate, LinearScorer, Threshold, TopK
from bigvision.routing import MixedResolution, ResolutionRouter


def brought(y: Tensor, have: int, want: int) -> Tensor:
    """From one factor to another."""
    if have <= want:
        return y if have == want else functional.avg_pool2d(y, want // have)
    return functional.interpolate(y, scale_factor=have / want, mode="bilinear", align_corners=False)


def part(row: int, col: int, factor: int) -> tuple[slice, slice]:
    """Where a region lies in the map of a factor."""
    side = REGION // factor
    return slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)


def soft(x: Tensor, level: Tensor) -> Tensor:
    """Every layer over the whole map at every resolution; each region then shows its own."""
    maps = [brought(x, 1, f) for f in FACTORS]
    for layer in LAYERS:
        made = [layer(one) for one in maps]
        maps = [torch.zeros_like(one) for one in made]
        for image, row, col in itertools.product(*map(range, level.shape)):
            own = int(level[image, row, col])
            block = made[own][image : image + 1, :, *part(row, col, FACTORS[own])]
            for one, f in zip(maps, FACTORS, strict=True):
                one[image, :, *part(row, col, f)] = brought(block, FACTORS[own], f)[0]
    return maps[0]


@pytest.mark.parametrize("straight", [True, False])
def test_hard_equals_soft_forward_and_backward(mixed: MixedResolution, straight: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 2, 16, 24, dtype=torch.float64, requires_grad=True)
    told = Told(torch.randn(12, 3, dtype=torch.float64))
    gate = Gate(told, straight=straight)
    wanted = [x, told.logits, *mixed.parameters()]
    loss = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    hard = ResolutionRouter(gate, mixed)(x)
    best, level = told.logits.softmax(1).max(1)
    weight = 1 + best - best.detach() if straight else best
    large = weight.view(2, 2, 3).repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)[:, None]
    expected = soft(x, level.view(2, 2, 3)) * large
    assert len(level.unique()) == 3
    torch.testing.assert_close(hard, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((hard * loss).sum(), wanted)
    for one, other in zip(found, torch.autograd.grad((expected * loss).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert one.any()


def test_with_all_levels_it_is_the_dense_loop_over_resolutions(mixed: MixedResolution) -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 2, 16, 24, dtype=torch.float64)
    told = Told(torch.randn(6, 3, dtype=torch.float64))
    y = ResolutionRouter(Gate(told, TopK(3)), mixed)(x)
    probs = told.logits.softmax(1).view(1, 2, 3, 3).repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)
    expected = torch.zeros_like(y)
    for k, f in enumerate(FACTORS):
        whole = brought(LAYERS[1](LAYERS[0](brought(x, 1, f))), f, 1)
        expected = expected + probs[..., k][:, None] * whole
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_regions_with_fewer_levels_weigh_nothing_in_later_passes(mixed: MixedResolution) -> None:
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    logits = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.8, 0.7]], dtype=torch.float64)
    gate = Gate(Told(logits), Threshold(0.5), normalization="identity")
    first, second = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 2]]])
    with torch.no_grad():
        a, b = mixed(x, first), mixed(x, second)
        expected = torch.cat([0.9 * a[..., :8], 0.8 * a[..., 8:] + 0.7 * b[..., 8:]], -1)
        torch.testing.assert_close(ResolutionRouter(gate, mixed)(x), expected, rtol=0, atol=1e-12)


def scene(images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 1, 32, 32] of fine or of flat regions, what becomes of them, and which are fine."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.rand(images, 4, 4, generator=generator) < 0.4
    flat = torch.randn(images, 1, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    where = fine.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    x = torch.where(where, torch.randn(images, 1, 32, 32, generator=generator), flat)
    return x, x.abs(), fine


@pytest.mark.slow
def test_gate_and_layers_train_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 1, 1)]
    # Both resolutions at first, so that the gate sees what each is worth; then one.
    gate = Gate(LinearScorer(2, 2, bias=True), TopK(Anneal(2, 1, 80)))
    router = ResolutionRouter(gate, MixedResolution(layers, 8, (1, 4), channels=1))
    optimizer = torch.optim.Adam(router.parameters(), 0.03)
    x, target, _ = scene(8, seed=1)
    losses = []
    for _ in range(120):
        decision = router.decide(x)
        task = functional.mse_loss(router.compute(x, decision), target)
        optimizer.zero_grad()
        (task + 0.3 * router.budget_loss(decision, 0.4)).backward()
        assert all(p.grad is not None and p.grad.any() for p in router.parameters())
        optimizer.step()
        gate.advance()
        losses.append(task.item())
    assert losses[-1] < 0.4 * losses[0]
    x, target, fine = scene(4, seed=2)
    router.eval()
    with torch.no_grad():
        decision = router.decide(x)
        full = decision.chosen(0)
        assert full[fine].float().mean() > 0.9 and full[~fine].float().mean() < 0.1
        router.compute(x, decision)  # traced at this size
        pixels = convolved_pixels(monkeypatch)
        y = router.compute(x, decision)
    assert functional.mse_loss(y, target) < 0.4 * losses[0]
    # Both layers ran on 64 pixels of a region in full, and on 4 of one at a quarter of the resolution.
    assert sum(pixels) == 2 * int(64 * full.sum() + 4 * (~full).sum())


def test_what_does_not_fit_is_refused(mixed: MixedResolution) -> None:
    with pytest.raises(ValueError, match=r"for 3 features and 3 experts, the regions have 4 features"):
        ResolutionRouter(Gate(LinearScorer(3, 3)), mixed)
    with pytest.raises(ValueError, match=r"4 features and 2 experts.*3 experts \('1/1', '1/2', '1/4'\)"):
        ResolutionRouter(Gate(LinearScorer(4, 2)), mixed)
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"for 2 experts.*\(1, 2, 4\)"):
        ResolutionRouter(Gate(Told(torch.zeros(2, 2))), mixed)(x)
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    unsure = Gate(Told(logits), Threshold(0.5), normalization="identity")
    with pytest.raises(ValueError, match="1 of 2 regions have no level"):
        ResolutionRouter(unsure, mixed)(x)
    router = ResolutionRouter(Gate(LinearScorer(4, 3)), mixed)
    with pytest.raises(ValueError, match=r"8 px, got \[1, 2, 8, 12\]"):
        router(x[..., :12])
    with pytest.raises(ValueError, match=r"\[1, 1, 1\], got \[1, 1, 2\]"):
        router.compute(x[..., :8], router.decide(x))
    with pytest.raises(ValueError, match=r"0\.\.1.*-0\.1"):
        router.budget_loss(router.decide(x), -0.1)
