"""The fused optimisers against torch's, idle rows against dense SGD, schedules, and W as an ordinary
parameter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads import SGD, Adam, Margin, RowwiseAdagrad, ShardedMarginHead, sampled
from heads.gates import GateInput
from heads.idle import StepHistory

Oracle = Callable[..., Tensor]
C, D = 31, 6
MARGIN = (1.0, 0.4, 0.1)


def make(**settings: Any) -> ShardedMarginHead:
    defaults = {"storage": "float64", "tile": 8, "optimizer": SGD(0.1)}
    return ShardedMarginHead(C, D, Margin(*MARGIN), 16.0, **(defaults | settings))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(-1, C, (7,), generator=generator)


class RowAdagrad(torch.optim.Optimizer):
    """The formula, written out."""

    def __init__(self, params: list[Tensor], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})
        self.sums = torch.zeros(C, dtype=torch.float64)

    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for w in group["params"]:
            self.sums += (w.grad**2).mean(1)
            scaled = w.grad / (self.sums.sqrt() + 1e-10)[:, None]
            w.data -= group["lr"] * (scaled + group["decay"] * w.data)


PAIRS: dict[str, tuple[Any, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "decay": (SGD(0.1, 0.0, 0.01), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01)),
    "momentum": (SGD(0.1, 0.9, 0.01), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01)),
    "adam": (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": (
        Adam(0.01, (0.8, 0.95), weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), weight_decay=0.1),
    ),
    "adagrad": (RowwiseAdagrad(0.1, weight_decay=0.01), lambda p: RowAdagrad(p, 0.1, 0.01)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_fused_steps_are_torchs(reference: Oracle, name: str) -> None:
    rule, plain = PAIRS[name]
    head = make(optimizer=rule)
    w = head.full_centers().requires_grad_()
    optimizer = plain([w])
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (head.optimizer, optimizer)]
    for step in range(4):
        x, y = batch(step)
        head(x, y).backward()
        optimizer.zero_grad()
        reference(x.detach(), y, w, MARGIN, 16.0).backward()
        optimizer.step()
        head.optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert head.lr == pytest.approx(rule.lr * 0.7**4)
    torch.testing.assert_close(head.full_centers(), w.detach(), rtol=1e-9, atol=1e-10)


def test_centres_as_an_ordinary_parameter(reference: Oracle) -> None:
    head = make(optimizer=None, active=sampled(0.5))
    fused = make(optimizer=SGD(0.1), active=sampled(0.5))
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    assert [p.shape for p in head.parameters()] == [(C, D)]
    x, y = batch(0)
    for one in (head, fused):
        optimizer.zero_grad()
        one(x, y).backward()
    expected = fused.full_centers()
    head(x, y).backward()
    optimizer.step()
    torch.testing.assert_close(head.full_centers(), expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="ordinary parameter"):
        _ = head.lr


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_idle_rows_follow_dense_sgd(reference: Oracle, momentum: float) -> None:
    """Dense SGD, whose gradient of a class that isn't active is zero, moves every row every step."""
    rule = SGD(0.3, momentum, 0.05, inactive="dense")
    head = make(optimizer=rule, active=sampled(0.2))
    w = head.full_centers().requires_grad_()
    optimizer = torch.optim.SGD([w], 0.3, momentum=momentum, weight_decay=0.05)
    for step in range(12):
        head.lr = optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        x, y = batch(step)
        rows = head.gate.select(GateInput(F.normalize(x.detach()), y, head.shard.own_rows(y), step)).rows
        mask = torch.full((C,), -torch.inf, dtype=torch.float64)
        mask[rows] = 0.0
        loss = head(x, y)
        optimizer.zero_grad()
        expected = reference(x.detach(), y, w, MARGIN, 16.0, log_weight=mask)
        expected.backward()
        assert not w.grad[mask == -torch.inf].any()
        optimizer.step()
        loss.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.full_centers(), w.detach(), rtol=1e-10, atol=1e-10)


def test_idle_rows_in_bfloat16_follow_in_expectation() -> None:
    """Twenty steps without a gradient, by one rounding each of 300 seeds, around where float64 arrives."""
    start = torch.linspace(-1.03, 1.01, C * D, dtype=torch.float64).view(C, D).bfloat16()

    def final(storage: str, seed: int) -> Tensor:
        rule = SGD(0.3, 0.8, 0.05, inactive="dense")
        head = make(optimizer=rule, active=sampled(0.05), storage=storage, seed=seed)
        head.shard.store.whole("weight").copy_(start)
        head.shard.history.replay([0.3] * 20)
        return head.full_centers().double()

    exact = final("float64", 0)
    draws = torch.stack([final("bfloat16", seed) for seed in range(300)])
    spacing = exact.abs() * 2**-7
    # Rounding by at most one spacing has a deviation of at most half of it; five standard errors.
    assert ((draws.mean(0) - exact).abs() < 5 * spacing / 2 / 300**0.5).all()
    assert (draws.std(0) > 0).double().mean() > 0.9


@settings(max_examples=30, deadline=None)
@given(rates=st.lists(st.floats(1e-4, 0.9), max_size=70), mu=st.floats(0, 0.99), wd=st.floats(0, 0.1))
def test_products_of_any_range_of_steps(rates: list[float], mu: float, wd: float) -> None:
    history = StepHistory(mu, wd)
    history.replay(rates)
    starts = torch.arange(len(rates) + 1)
    found = history.products_until_now(starts)
    for start in starts.tolist():
        product = torch.eye(2, dtype=torch.float64)
        for lr in rates[start:]:
            product = torch.tensor([[1 - lr * wd, -lr * mu], [wd, mu]], dtype=torch.float64) @ product
        torch.testing.assert_close(found[start], product, rtol=1e-12, atol=1e-14)


def test_thousands_of_idle_steps_keep_their_digits() -> None:
    """Where inverting prefix products would have lost them all: m decays by 0.9 each step."""
    history = StepHistory(0.9, 5e-4)
    for _ in range(3000):
        history.append(0.1)
    product = torch.tensor([[1 - 0.1 * 5e-4, -0.1 * 0.9], [5e-4, 0.9]], dtype=torch.float64)
    expected = torch.linalg.matrix_power(product, 5)
    torch.testing.assert_close(
        history.products_until_now(torch.tensor([2995]))[0], expected, rtol=1e-13, atol=0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SGD(-0.1),
        lambda: SGD(0.1, momentum=1.0),
        lambda: SGD(0.1, inactive="lazy"),  # type: ignore[arg-type]
        lambda: Adam(0.1, inactive="dense"),  # type: ignore[arg-type]
        lambda: RowwiseAdagrad(0.1, inactive="dense"),  # type: ignore[arg-type]
        lambda: Adam(0.1, betas=(0.9, 1.0)),
    ],
)
def test_impossible_settings_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"got|nonlinear"):
        wrong()
