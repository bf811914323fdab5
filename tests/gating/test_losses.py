import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import (
    Noise,
    budget_loss,
    expected_cost,
    importance_loss,
    load_loss,
    normalize,
    switch_loss,
    top_k,
    z_loss,
)

shapes = st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 99))


def draw(shape: tuple[int, int, int]) -> torch.Tensor:
    t, e, seed = shape
    return torch.randn(t, e, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2 if mean else 0.0


@given(shapes)
def test_importance_and_z_are_the_loop(shape: tuple[int, int, int]) -> None:
    logits = draw(shape)
    probs = normalize(logits)
    t, e = logits.shape
    sums = [sum(float(probs[i, j]) for i in range(t)) for j in range(e)]
    assert float(importance_loss(probs)) == pytest.approx(slow_variation(sums), abs=1e-12)
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()]
    assert float(z_loss(logits)) == pytest.approx(sum(squares) / max(t, 1))


@given(shapes, st.integers(1, 6))
def test_load_is_the_loop(shape: tuple[int, int, int], k: int) -> None:
    logits = draw(shape)
    t, e = logits.shape
    noisy = Noise().perturb(logits)
    load = [0.0] * e
    for i in range(t):
        bar = sorted(noisy[i].tolist(), reverse=True)[min(k, e) - 1]
        for j in range(e):
            load[j] += 0.5 * math.erfc((bar - float(logits[i, j])) / 0.3 / math.sqrt(2))
    assert float(load_loss(logits, noisy, k, 0.3)) == pytest.approx(slow_variation(load), abs=1e-9)


@given(shapes, st.integers(1, 5))
def test_switch_is_the_loop(shape: tuple[int, int, int], k: int) -> None:
    logits = draw(shape)
    t, e = logits.shape
    probs, mask = normalize(logits), top_k(logits, k)
    total = int(mask.sum())
    loss = sum(e * (int(mask[:, j].sum()) / total) * sum(probs[:, j].tolist()) / t for j in range(e) if total)
    assert float(switch_loss(probs, mask)) == pytest.approx(loss)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_values_at_uniform(rounds: int, num_experts: int, k: int) -> None:
    k = min(k, num_experts)
    logits = torch.zeros(rounds * num_experts, num_experts)
    probs = normalize(logits)
    # Token t takes experts t, t + 1, ... in turn: a uniform load.
    turn = (torch.arange(len(logits))[:, None] + torch.arange(k)) % num_experts
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, turn, True)
    assert float(importance_loss(probs)) == pytest.approx(0, abs=1e-12)
    assert float(load_loss(logits, Noise().perturb(logits), k, 1 / num_experts)) == pytest.approx(0, abs=1e-9)
    assert float(switch_loss(probs, mask)) == pytest.approx(1)
    assert float(z_loss(logits)) == pytest.approx(math.log(num_experts) ** 2)


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_are_finite(num_tokens: int, num_experts: int, masked: bool) -> None:
    logits = torch.randn(num_tokens, num_experts, requires_grad=True)
    allowed = torch.full(logits.shape, not masked)
    probs = normalize(logits, allowed=allowed)
    mask = top_k(logits, 1, allowed=allowed)
    cost = torch.ones(num_experts)
    for loss in (
        importance_loss(probs),
        load_loss(logits, Noise().perturb(logits), 2, 0.5, allowed=allowed),
        switch_loss(probs, mask),
        z_loss(logits, allowed=allowed),
        budget_loss(probs, cost, 0.1),
    ):
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.shape == () and loss.isfinite() and grad.isfinite().all()


def test_masked_losses_look_at_the_allowed_only() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0], [9.0, 9.0, 9.0]])
    allowed = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert float(z_loss(logits, allowed=allowed)) == pytest.approx(math.log(2) ** 2 / 2)
    # Two allowed experts with equal logits, one with no load at all: mean 2/3 of a load, variance 2/9.
    loss = load_loss(logits, logits, 1, 0.5, allowed=allowed)
    assert float(loss) == pytest.approx(0.5)


def test_gradients() -> None:
    logits = draw((4, 3, 0)).requires_grad_()
    noisy_part = Noise().perturb(torch.zeros(4, 3)).double()
    mask = top_k(logits, 1)
    cost = torch.tensor([1.0, 2.0, 4.0])
    check = torch.autograd.gradcheck
    assert check(lambda z: importance_loss(normalize(z)), logits)
    assert check(lambda z: load_loss(z, z + noisy_part, 2, 0.4), logits)
    assert check(lambda z: switch_loss(normalize(z), mask), logits)
    assert check(z_loss, logits)
    assert check(lambda z: budget_loss(normalize(z), cost, 0.1), logits)


def test_descending_a_balance_loss_balances() -> None:
    for name in ("importance", "load", "switch"):
        logits = (draw((64, 4, 3)) + torch.tensor([2.0, 0, 0, -1])).requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=20.0)
        before = top_k(logits, 1).float().mean(0).max()
        for step in range(200):
            probs, noisy = normalize(logits), Noise().perturb(logits, step=step)
            losses = {
                "importance": lambda p=probs: importance_loss(p),
                "load": lambda n=noisy, z=logits: load_loss(z, n, 1, Noise().std(4)),
                "switch": lambda p=probs, z=logits: switch_loss(p, top_k(z, 1)),
            }
            optimizer.zero_grad()
            losses[name]().backward()
            optimizer.step()
        assert top_k(logits, 1).float().mean(0).max() < before - 0.1, name


def test_the_budget_is_in_shares_of_the_dearest_expert() -> None:
    cost = torch.tensor([0.0, 2.0, 8.0])  # milliseconds, say
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    assert float(expected_cost(probs, cost)) == pytest.approx((2.5 + 8) / 2)
    mean = 5.25 / 8
    assert float(budget_loss(probs, cost)) == pytest.approx(mean**2)
    assert float(budget_loss(probs, cost, 0.25)) == pytest.approx((mean - 0.25) ** 2)
    assert float(budget_loss(probs, cost, 0.7)) == 0.0
    assert float(budget_loss(probs, cost * 1000, 0.25)) == pytest.approx((mean - 0.25) ** 2)


def test_the_budget_moves_probability_to_cheap_experts() -> None:
    logits = torch.zeros(5, 3, requires_grad=True)
    budget_loss(normalize(logits), torch.tensor([1.0, 3.0, 9.0]), 0.2).backward()
    assert logits.grad is not None and (logits.grad[:, 0] < 0).all() and (logits.grad[:, 2] > 0).all()


def test_bad_input_is_refused_with_its_values() -> None:
    probs = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"0\.\.1, got 1\.2"):
        budget_loss(probs, torch.ones(2), 1.2)
    with pytest.raises(ValueError, match=r"must be \[2\] finite numbers of at least 0, got \[1\.0, -1\.0\]"):
        budget_loss(probs, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"must be \[2\] finite numbers of at least 0, got \[1\.0\]"):
        expected_cost(probs, torch.ones(1))
    with pytest.raises(ValueError, match=r"bool \[2, 2\], got torch.float32 \[2, 2\]"):
        switch_loss(probs, probs)
    with pytest.raises(ValueError, match=r"got 1, 0\.0, \[2, 2\] and \[2, 2\]"):
        load_loss(probs, probs, 1, 0.0)
