"""A cascade in training: its loss by a slow loop, its gate by what a scene's router does with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_networks import convolutions
from torch.nn import functional

from bigvision.gating import budget_loss
from bigvision.routing.cascade import Cascade, expected_loss
from bigvision.routing.learned import region_features
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.scene import CHEAP, FULL, SceneRouter
from bigvision.streaming.losses import CrossEntropy, Dice, Focal

REGION, IGNORE = 8, 255


def cascade(seed: int = 0) -> Cascade:
    torch.manual_seed(seed)
    found = Cascade(convolutions(2, 3), convolutions(2, 3), 2, REGION).eval()
    torch.nn.init.normal_(found.scorer.weight)
    torch.nn.init.normal_(found.standard.running_mean)
    torch.nn.init.uniform_(found.standard.running_var, 0.1, 2.0)
    return found


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1))
def test_the_loss_is_the_average_over_what_the_gate_may_choose(
    seed: int, crops: int, nodata: float, budget: float
) -> None:
    """For cross-entropy, whose sums are a mean over pixels, the average can be written pixel by pixel."""
    model = cascade(seed)
    model.cost.copy_(torch.tensor([1.0, 5.0]))
    x = torch.randn(crops, 2, 16, 16)
    target = torch.randint(0, 3, (crops, 16, 16))
    missing = torch.rand(crops, 2, 2) < nodata
    wide = missing.repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)
    x, target = x.masked_fill(wide[:, None], 0), target.masked_fill(wide, IGNORE)
    found = expected_loss(model, CrossEntropy(ignore_index=IGNORE), x, model(x), target, budget)
    total, probs = 0.0, []
    for image, row, col in (~missing).nonzero().tolist():
        part = (slice(row * REGION, (row + 1) * REGION), slice(col * REGION, (col + 1) * REGION))
        cheap, full = (y[image][:, *part] for y in model(x))
        seen = torch.ones(REGION, REGION, dtype=torch.bool)
        p = model.gate(region_features(x[image][:, *part], cheap, seen)[None]).softmax(1)[0]
        probs.append(p)
        for y, chance in ((cheap, p[CHEAP]), (full, p[FULL])):
            losses = functional.cross_entropy(y[None], target[image][part][None], reduction="sum")
            total = total + (0.5 * chance + 0.25) * losses
    if not probs:
        assert float(found) == 0
        return
    excess = budget_loss(torch.stack(probs), torch.tensor([1.0, 5.0]), (1 + 4 * budget) / 5)
    expected = total / (len(probs) * REGION**2) + 10 * excess
    assert torch.allclose(found.float(), expected.float(), rtol=1e-4)


def test_a_gate_without_an_opinion_gives_the_mean_of_both_networks() -> None:
    model = cascade()
    torch.nn.init.zeros_(model.scorer.weight)
    x, target = torch.randn(1, 2, 16, 16), torch.randint(0, 3, (1, 16, 16))
    for loss in (CrossEntropy(), Focal(), CrossEntropy() + 0.5 * Dice()):
        assert loss(model.cheap(x), target) != loss(model.full(x), target)
        twins = (model.full(x), model.full(x))
        found = expected_loss(model, loss, x, twins, target, budget=1.0)
        assert torch.allclose(found, loss(model.full(x), target))


def test_the_gate_learns_where_the_full_network_is_better_and_keeps_the_budget() -> None:
    """The full network is right; the cheap one is wrong where the first band is bright."""
    torch.manual_seed(0)
    model = cascade()
    torch.nn.init.zeros_(model.scorer.weight)
    model.cost.copy_(torch.tensor([1.0, 11.0]))
    bright = (torch.rand(4, 4, 4) < 0.25).float()
    mean = (bright * 2 - 0.5).repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)
    x = mean[:, None] + 0.1 * torch.randn(4, 2, 32, 32)
    target = torch.randint(0, 3, (4, 32, 32))
    right = functional.one_hot(target, 3).permute(0, 3, 1, 2).float() * 4
    cheap = torch.where(mean[:, None] > 0, right.roll(1, 1), right)
    optimizer = torch.optim.Adam(model.scorer.parameters(), 0.05)
    for _ in range(300):
        loss = expected_loss(model, CrossEntropy(), x, (cheap, right), target, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probs = model.regions(x, cheap, torch.ones(4, 32, 32, dtype=torch.bool)).probs[:, FULL]
    wanted = bright.flatten() > 0
    assert float(probs[wanted].min()) > 0.5 > float(probs[~wanted].max())
    assert float(probs.mean()) < 0.25 + 0.1


def test_what_is_learned_is_what_routes_a_scene() -> None:
    """Training on a crop and routing a scene of the same pixels, nodata included, see one score."""
    model = cascade()
    pixels = torch.randn(2, 24, 24)
    valid = torch.ones(24, 24, dtype=torch.bool)
    valid[:8, :8], valid[12:, 20:] = False, False
    pixels *= valid

    class Source:
        shape = (2, 24, 24)

        def read(self, window):  # type: ignore[no-untyped-def]
            rows, cols = window.toslices()
            return pixels[:, rows, cols].numpy(), valid[rows, cols].numpy()

    spec = RouteSpec("a.b:c", region=REGION, gate="learned")
    router = SceneRouter(Source(), model.cheap, model.full, spec, gate=model.gate)
    (block,) = (router.score(box, lambda *_: None) for box in router.blocks())
    with torch.no_grad():
        found = model.regions(pixels[None], model.cheap(pixels[None]), valid[None])
    assert block.data.sum() == 8 and not block.data[0, 0]
    at = [(box.top // REGION, box.left // REGION) for _, box in found.places]
    assert at == list(zip(*np.nonzero(block.data), strict=True))
    assert np.allclose(block.score[block.data], found.probs[:, FULL].numpy(), atol=1e-5)


def test_latency_is_measured_of_both_choices() -> None:
    model = cascade()
    taken = iter([0.25, 2.0])
    assert model.measure(lambda function: (function(), next(taken))[1]).tolist() == [0.25, 2.25]
    assert "cost" in model.state_dict()
    probs = torch.tensor([[0.25, 0.75]])
    assert float(model.budget_loss(probs, 0.75)) == pytest.approx(0, abs=1e-12)
    assert float(model.budget_loss(probs, 0.5)) == pytest.approx((0.25 * 2 / 2.25) ** 2)
