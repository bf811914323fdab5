"""A cascade in training: its loss by a slow loop, its gate by what a scene's router does with it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_networks import convolutions
from torch.nn import functional

from bigvision.gating import budget_loss
from bigvision.routing.boxes import Box
from bigvision.routing.cascade import Cascade, cascade_loss, expected_loss
from bigvision.routing.learned import region_features
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.scene import CHEAP, FULL, SceneRouter
from bigvision.streaming.losses import CrossEntropy, Dice, Focal

REGION, IGNORE = 8, 255


def cascade(seed: int = 0) -> Cascade:
    torch.manual_seed(seed)
    found = Cascade(convolutions(2, 3), convolutions(2, 3), 2, REGION, 0.25).eval()
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
    plain = torch.randn(crops, 2, 16, 16)
    target = torch.randint(0, 3, (crops, 16, 16))
    missing = torch.rand(crops, 2, 2) < nodata
    wide = missing.repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)
    plain, target = plain.masked_fill(wide[:, None], 0), target.masked_fill(wide, IGNORE)
    x = plain * 1.5
    with torch.no_grad():
        settled = model(plain)
        logits = training_outputs(model, x)
    found = cascade_loss(model, CrossEntropy(ignore_index=IGNORE), x, plain, target, budget)
    experts, gate, probs = 0.0, 0.0, []
    for image, row, col in (~missing).nonzero().tolist():
        part = (slice(row * REGION, (row + 1) * REGION), slice(col * REGION, (col + 1) * REGION))
        features = region_features(plain[image][:, *part], settled[CHEAP][image][:, *part], shown())
        p = model.gate(features[None]).softmax(1)[0]
        probs.append(p)
        for e in (CHEAP, FULL):
            losses = [
                functional.cross_entropy(y[image][None, :, *part], target[image][part][None], reduction="sum")
                for y in (logits[e], settled[e])
            ]
            experts = experts + (0.5 * p[e] + 0.25) * losses[0]
            gate = gate + p[e] * losses[1]
    if not probs:
        assert float(found) == 0
        return
    excess = budget_loss(torch.stack(probs), torch.tensor([1.0, 5.0]), (1 + 4 * budget) / 5)
    expected = (experts + gate) / (len(probs) * REGION**2) + 10 * excess
    assert torch.allclose(found.float(), expected.float(), rtol=1e-4)


def shown() -> torch.Tensor:
    return torch.ones(REGION, REGION, dtype=torch.bool)


def training_outputs(model: Cascade, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What batch norm in training mode makes of a batch, with its state as it was."""
    twin = copy.deepcopy(model).train()
    return twin(x)


def test_networks_and_gate_learn_from_their_own_terms_only() -> None:
    model = cascade()
    plain, target = torch.randn(2, 2, 16, 16), torch.randint(0, 3, (2, 16, 16))
    cascade_loss(model, CrossEntropy(), plain * 2, plain, target, 0.25).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    slopes = []
    for x in (torch.zeros_like(plain), plain):  # whatever the networks train on, the gate sees plain pixels
        twin = copy.deepcopy(model)
        found = cascade_loss(twin, CrossEntropy(), x, plain, target, 1.0)
        slopes += torch.autograd.grad(found, [twin.scorer.weight])
    assert torch.allclose(*slopes, rtol=1e-5, atol=1e-7)


def test_equal_networks_cost_what_they_cost_whatever_the_chances() -> None:
    torch.manual_seed(0)
    y, target = torch.randn(1, 3, 16, 16), torch.randint(0, 3, (1, 16, 16))
    places = [(0, Box(r, c, r + 1, c + 1).scaled(REGION)) for r in range(2) for c in range(2)]
    chances = torch.rand(4, 2).softmax(1)
    for loss in (CrossEntropy(), Focal(), CrossEntropy() + 0.5 * Dice()):
        assert torch.allclose(expected_loss(loss, (y, y), target, places, chances), loss(y, target))


class Given(torch.nn.Module):
    """Logits that stand in the input's bands: [N, 1 + 3 + 3, s, s]."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.first : self.first + 3]


@pytest.mark.slow
def test_the_gate_learns_where_the_full_network_is_better_and_keeps_the_budget() -> None:
    """The full network is right; the cheap one is wrong where the first band is bright."""
    torch.manual_seed(0)
    model = Cascade(Given(1), Given(4), 7, REGION, 0.25)
    model.cost.copy_(torch.tensor([1.0, 11.0]))
    bright = (torch.rand(4, 4, 4) < 0.25).float()
    mean = (bright * 2 - 0.5).repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)[:, None]
    target = torch.randint(0, 3, (4, 32, 32))
    right = functional.one_hot(target, 3).permute(0, 3, 1, 2).float() * 4
    cheap = torch.where(mean > 0, right.roll(1, 1), right)
    x = torch.cat([mean + 0.1 * torch.randn_like(mean), cheap, right], 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(300):
        loss = cascade_loss(model, CrossEntropy(), x, x, target, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
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
