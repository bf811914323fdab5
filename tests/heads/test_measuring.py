"""What looks at a head moves nothing of it: a run that is measured takes the course of one that isn't."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heads import (
    SGD,
    AdaFace,
    Margin,
    ShardedMarginHead,
    add_identities,
    clustered,
    hashed,
    sampled,
    save_head,
)

C, D = 60, 6
GATES = [
    None,
    sampled(0.3, unbiased=True),
    clustered(9, 1, epsilon=0.2, refresh=2, iterations=2),
    hashed(2, 4),
]


def make(active: Any, **settings: Any) -> ShardedMarginHead:
    defaults = {"margin": AdaFace(momentum=0.5), "storage": "float64", "optimizer": SGD(0.1, 0.9)}
    return ShardedMarginHead(C, D, scale=8.0, active=active, tile=16, **(defaults | settings))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = (3 + 9 * step) * torch.randn(7, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(-1, C, (7,), generator=generator)


def look(head: ShardedMarginHead, step: int, folder: Path) -> None:
    """Every call that says something of a head."""
    x, y = batch(100 + step)
    head.dropped_share(x, y)
    head.full_centers()
    save_head(head, folder / "head")
    head.state_dict()
    add_identities(head, 2)
    head.eval()(x, y).backward()
    head.train()
    assert repr(head) and head.settings
    if head.gate is not None:
        head.gate.expected(step)


def course(head: ShardedMarginHead, between: Callable[[int], None]) -> list[Any]:
    seen: list[Any] = []
    for step in range(5):
        between(step)
        x, y = batch(step)
        loss = head(x, y)
        between(step)
        loss.backward()
        certificate = getattr(head.gate, "certificate", None)
        seen.append((loss.item(), x.grad.tolist(), float(head.margin.mean), head.step, head.skipped))
        between(step)
        assert getattr(head.gate, "certificate", None) is certificate
    return [*seen, head.full_centers().tolist()]


@pytest.mark.parametrize("active", GATES)
@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9), None])
def test_a_measured_run_is_the_unmeasured_one(active: Any, optimizer: Any, tmp_path: Path) -> None:
    unmeasured, measured = make(active, optimizer=optimizer), make(active, optimizer=optimizer)
    random = torch.get_rng_state()
    alone = course(unmeasured, lambda step: None)
    assert course(measured, lambda step: look(measured, step, tmp_path)) == alone
    assert torch.equal(torch.get_rng_state(), random)


def test_the_measured_share_is_of_the_margins_that_the_step_will_use() -> None:
    """Both denominators are those of one margin, that of the next step: statistics follow the batch first."""
    head, twin = make(sampled(0.3), margin=AdaFace(momentum=1.0)), make(None, margin=AdaFace(momentum=1.0))
    x, y = batch(3)
    share = head.dropped_share(x, y)
    gated = []
    for one in (head, twin):
        _, done = one._run_forward(x.detach(), y)
        gated.append(done.lse[done.valid])
    torch.testing.assert_close(share, 1.0 - torch.exp(gated[0] - gated[1]), rtol=1e-9, atol=1e-12)


def test_without_a_gate_nothing_is_dropped() -> None:
    x, y = batch(0)
    assert make(None, margin=Margin()).dropped_share(x, y).eq(0).all()
