"""Routed regions against every expert run over the whole image: float64, so that only mistakes differ."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_networks import Hourglass, Told, convolutions, convolved_pixels, told
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import CosineScorer, Gate, LinearScorer, TopK
from bigvision.routing import BudgetedTopOne, LowRes, RegionRouter, Skip, seconds

CHANNELS, CLASSES, REGION = 3, 2, 16


def make_experts() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    experts = {
        "skip": Skip(CLASSES),
        "low-res": LowRes(convolutions(CHANNELS, CLASSES), 2),
        "cheap": convolutions(CHANNELS, CLASSES),
        "full": Hourglass(CHANNELS, CLASSES),
    }
    for module in experts.values():
        module.double().eval()
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return experts


EXPERTS = make_experts()


def oracle(experts: dict[str, nn.Module], x: Tensor, routes: Tensor) -> Tensor:
    """Every expert over the whole padded image; each region shows the one it is routed to."""
    height, width = x.shape[-2:]
    padded = functional.pad(x, (0, -width % 8, 0, -height % 8))
    outputs = [module(padded)[..., :height, :width] for module in experts.values()]
    chosen = routes.repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)[:, :height, :width]
    result = torch.zeros(len(x), CLASSES, height, width, dtype=x.dtype)
    for e, y in enumerate(outputs):
        result = torch.where((chosen == e)[:, None], y, result)
    return result


@pytest.fixture(scope="module")
def router() -> RegionRouter:
    """Traced once; tests give it gates."""
    return RegionRouter(told(torch.zeros(1).long(), 4), EXPERTS, REGION)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2),
    # Ragged, tiny, exact and long images; few, because each size is traced.
    st.sampled_from([(1, 1), (7, 40), (48, 64), (75, 61), (16, 100)]),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([REGION**2, 4 * REGION**2, 2048**2]),
)
def test_each_region_is_its_expert_over_the_whole_image(
    router: RegionRouter, images: int, size: tuple[int, int], seed: int, join: bool, max_pixels: int
) -> None:
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    rows, cols = -(-height // REGION), -(-width // REGION)
    routes = torch.randint(0, 4, (images, rows, cols), generator=generator)
    x = torch.randn(images, CHANNELS, height, width, dtype=torch.float64, generator=generator)
    router.gate, router.join, router.max_pixels = told(routes, 4), join, max_pixels
    with torch.no_grad():
        assert torch.allclose(router(x), oracle(EXPERTS, x, routes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("expert", range(4))
def test_all_regions_in_one_expert_equal_the_dense_network(expert: int) -> None:
    x = torch.randn(1, CHANNELS, 48, 64, dtype=torch.float64)
    module = list(EXPERTS.values())[expert]
    router = RegionRouter(told(torch.full((12,), expert), 4), EXPERTS, REGION)
    with torch.no_grad():
        assert torch.allclose(router(x), module(x), rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_oracle() -> None:
    routes = torch.tensor([[[3, 2, 1], [0, 3, 3]]])
    experts = make_experts()
    x = torch.randn(1, CHANNELS, 32, 43, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, CLASSES, 32, 43, dtype=torch.float64)
    parameters = [p for module in experts.values() for p in module.parameters()]
    routed = RegionRouter(told(routes, 4), experts, REGION)(x)
    found = torch.autograd.grad((routed * weight).sum(), [x, *parameters])
    expected = torch.autograd.grad((oracle(experts, x, routes) * weight).sum(), [x, *parameters])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


def test_hard_equals_soft_forward_and_backward_also_with_weights() -> None:
    torch.manual_seed(0)
    gate = Gate(LinearScorer(2 * CHANNELS, 4), TopK(2))
    x = torch.randn(2, CHANNELS, 40, 32, dtype=torch.float64)
    results = []
    for mode in ("hard", "soft"):
        router = RegionRouter(gate, EXPERTS, REGION, mode=mode)
        y = router(x)
        slopes = torch.autograd.grad(y.square().sum(), list(router.parameters()), allow_unused=True)
        results.append([y, *(torch.zeros(1) if slope is None else slope for slope in slopes)])
    for hard, soft in zip(*results, strict=True):
        assert torch.allclose(hard.double(), soft.double(), rtol=1e-5, atol=1e-6) or not (
            hard.any() or soft.any()
        )


def test_training_batch_norm_runs_on_windows_and_learns_with_the_gate() -> None:
    torch.manual_seed(0)
    experts = {"skip": Skip(1), "full": convolutions(1, 1)}
    gate = Gate(LinearScorer(2, 2, bias=True))
    router = RegionRouter(gate, experts, 8)
    begun = gate.scorer.weight.detach().clone()
    x = torch.zeros(4, 1, 32, 32)
    x[..., :16] = torch.randn(4, 1, 32, 16)
    target = functional.conv2d(x, torch.ones(1, 1, 3, 3), padding=1)
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    losses = []
    for _ in range(60):
        decision = router.decide(x)
        y = router.compute(x, decision)
        loss = functional.mse_loss(y, target) + 0.3 * router.budget_loss(decision, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert experts["full"][3].num_batches_tracked > 0
    assert (gate.scorer.weight != begun).any()


def test_the_budget_loss_moves_probability_to_the_cheap() -> None:
    gate = Gate(Told(torch.zeros(4, 4)))
    router = RegionRouter(gate, EXPERTS, REGION)
    decision = router.decide(torch.randn(1, CHANNELS, 32, 32, dtype=torch.float64))
    loss = router.budget_loss(decision, 0.1)
    (slope,) = torch.autograd.grad(loss, gate.scorer.logits)
    order = router.cost.argsort()
    assert loss > 0 and (slope[:, order[-1]] > 0).all() and (slope[:, order[0]] < 0).all()
    assert router.budget_loss(decision, 1.0) == 0


def test_measured_latency_becomes_the_cost() -> None:
    router = RegionRouter(told(torch.zeros(4).long(), 4), EXPERTS, REGION)
    cost = router.measure(lambda function: seconds(function, repeats=1))
    assert cost[0] == 0 and (cost[1:] > 0).all() and torch.equal(cost, router.cost)


def test_skipped_work_is_really_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    full = nn.Conv2d(1, 1, 3, padding=1).eval()
    router = RegionRouter(told(torch.tensor([0] * 15 + [1]), 2), {"skip": Skip(1), "full": full}, 8)
    x = torch.randn(1, 1, 32, 32)
    router(x)  # traced
    pixels = convolved_pixels(monkeypatch)
    router(x)
    assert pixels == [8 * 8]  # one convolution on one region


def test_nodata_goes_nowhere_and_is_zero() -> None:
    x = torch.randn(1, CHANNELS, 48, 40, dtype=torch.float64)
    valid = torch.zeros(1, 48, 40, dtype=torch.bool)
    valid[0, 17, 3] = True
    router = RegionRouter(told(torch.full((9,), 3), 4), EXPERTS, REGION)
    decision = router.decide(x, valid=valid)
    assert decision.expert.tolist() == [[[-1] * 3, [3, -1, -1], [-1] * 3]]
    y = router.compute(x, decision)
    assert torch.allclose(y[..., 16:32, :16], EXPERTS["full"](x)[..., 16:32, :16])
    assert float(y.abs().sum()) == pytest.approx(float(y[..., 16:32, :16].abs().sum()), rel=1e-12)
    assert torch.equal(decision.expert, router.decide(x, allowed=decision.expert >= 0).expert)


def test_zero_idle_gives_idle_experts_zero_gradients() -> None:
    x = torch.randn(1, CHANNELS, 16, 16, dtype=torch.float64)
    experts = make_experts()
    RegionRouter(told(torch.tensor([2]), 4), experts, REGION, zero_idle=True)(x).sum().backward()
    assert all((p.grad == 0).all() for p in experts["full"].parameters())


@pytest.mark.slow
def test_a_plan_counts_halos_and_joins_and_says_when_routing_does_not_pay() -> None:
    router = RegionRouter(told(torch.full((16,), 2), 4), EXPERTS, REGION)
    x = torch.randn(1, CHANNELS, 64, 64, dtype=torch.float64)
    assert router.cost.argmax() == 2  # the dearest
    everything = router.plan(router.decide(x), 64, 64)
    assert everything.share == 1 and not everything.pays and "would not pay" in str(everything)
    full = everything.experts[2]
    assert (full.regions, full.rectangles) == (16, 1) and full.flops < full.flops_alone
    sparse = RegionRouter(told(torch.tensor([2] + [0] * 15), 4), EXPERTS, REGION)
    plan = sparse.plan(sparse.decide(x), 64, 64)
    assert plan.pays and 1 / 16 < plan.share < 4 / 16
    stripes = RegionRouter(told((torch.arange(16) % 2) * 2, 4), EXPERTS, REGION)
    assert stripes.plan(stripes.decide(x), 64, 64).share > 0.51


class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


def linear_gate(dim: int = 2 * CHANNELS, count: int = 4) -> Gate:
    return Gate(LinearScorer(dim, count))


@pytest.mark.parametrize(
    ("gate", "experts", "region", "words"),
    [
        (
            linear_gate(count=2),
            {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 4, 1)},
            8,
            ["'a'", "2", "'b'", "4"],
        ),
        (
            linear_gate(count=2),
            {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 2, 2, stride=2)},
            8,
            ["1/1", "1/2", "'b'"],
        ),
        (linear_gate(), EXPERTS, 20, ["20 px", "'full'", "8 px"]),
        (
            linear_gate(count=1),
            {"a": nn.Sequential(nn.Conv2d(3, 2, 1), Global())},
            8,
            ["no halo", "'a'", "mean"],
        ),
        (linear_gate(dim=10), EXPERTS, 16, ["10 features", "6 features"]),
        (linear_gate(count=3), EXPERTS, 16, ["3 experts", "4 experts"]),
        (Gate(CosineScorer(6, 3), TopK(1)), EXPERTS, 16, ["3 experts", "4 experts"]),
        (linear_gate(), {}, 16, ["none"]),
        (linear_gate(), EXPERTS, 0, ["0"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_values(
    gate: Gate, experts: dict[str, nn.Module], region: int, words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        RegionRouter(gate, experts, region)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_images_masks_and_decisions_that_do_not_fit_are_refused() -> None:
    router = RegionRouter(told(torch.zeros(4).long(), 4), EXPERTS, REGION)
    x = torch.randn(1, CHANNELS, 32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*\[1, 2, 32, 32\]"):
        router(x[:, :2])
    with pytest.raises(ValueError, match=r"\[1, 32, 32\].*\[1, 31, 32\]"):
        router(x, valid=torch.ones(1, 31, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[1, 2, 2\].*\[1, 3, 2\]"):
        router(x, allowed=torch.ones(1, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 2, 3\)"):
        router.compute(torch.randn(1, CHANNELS, 32, 40, dtype=torch.float64), router.decide(x))
    with pytest.raises(ValueError, match=r"0\.\.1.*1\.5"):
        router.budget_loss(router.decide(x), 1.5)
    router.gate = told(torch.zeros(4).long(), 3)
    with pytest.raises(ValueError, match=r"for 3 experts.*have 4"):
        router.decide(x)


@given(st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_a_budget_is_kept_and_every_allowed_region_has_one_expert(
    regions: int, seed: int, most: float, some: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(regions, 3, generator=generator)
    allowed = torch.rand(regions, 3, generator=generator) > 0.2
    allowed[:, 0] |= allowed.any(1)  # the unbounded expert takes whatever may go anywhere
    mask = BudgetedTopOne((1.0, some, most)).select(scores, allowed=allowed)
    assert torch.equal(mask.sum(1), allowed.any(1).long())
    assert not (mask & ~allowed).any()
    wanted = int(allowed.any(1).sum())
    assert mask[:, 1].sum() <= some * wanted + 1e-6 and mask[:, 2].sum() <= most * wanted + 1e-6


def test_a_budget_keeps_those_that_want_it_most() -> None:
    scores = torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    assert BudgetedTopOne((1.0, 0.5)).select(scores)[:, 1].tolist() == [True, False, True, False]


@pytest.mark.parametrize("shares", [(1.0, 1.2), (0.5, 0.5), (-0.1, 1.0), ()])
def test_budgets_outside_zero_to_one_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="share"):
        BudgetedTopOne(shares)
