"""Sums of exponentials stay within their number format, and no pass is made that this doesn't need."""

from math import log
from typing import Any

import pytest
import torch

from heads import SGD, Margin, ShardedMarginHead, sampled
from heads.gates import GateInput
from heads.partition import class_range
from heads.shard import ActiveRows, Shard, needs_shift
from heads.stores import DeviceRows


def shard(classes: int, scale: float, dtype: torch.dtype, **changes: Any) -> Shard:
    """A shard that knows of many classes and holds none."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    store = DeviceRows(("weight",), (0, 4), dtype, torch.device("cpu"))
    held = class_range(classes, 0, 1)
    return Shard(held, store, dtype, dtype, torch.ones(0, dtype=acc), {}, scale=scale, **changes)


@pytest.mark.parametrize(
    ("classes", "scale", "dtype", "changes", "heaviest", "shifted"),
    [
        (10**7, 64.0, torch.float32, {}, 0.0, False),  # one tile's sum is float32, theirs all float64
        (10**9, 64.0, torch.bfloat16, {}, 0.0, False),
        (10**9, 64.0, torch.float32, {"tile": 1 << 24}, 0.0, True),
        (100, 75.0, torch.float32, {"tile": 1 << 24}, 0.0, False),  # there are no more classes
        (10**7, 72.0, torch.float32, {}, 0.0, True),
        (10**7, 64.0, torch.float32, {}, -log(1e-4), True),
        (10**7, 600.0, torch.float64, {}, 0.0, False),
        (10**7, 680.0, torch.float64, {}, 0.0, True),  # the sum of all
        (10, 1.0, torch.float64, {"normalized": False}, 0.0, True),
    ],
)
def test_the_largest_logit_is_carried_along_where_it_must_be(
    classes: int, scale: float, dtype: torch.dtype, changes: dict[str, Any], heaviest: float, shifted: bool
) -> None:
    assert needs_shift(shard(classes, scale, dtype, **changes), ActiveRows(heaviest=heaviest)) == shifted


@pytest.mark.parametrize("storage", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 64.0, 71.0, 73.0, 79.0, 81.0, 88.0, 200.0, 600.0, 690.0, 710.0, 5e3])
def test_equal_centres_give_the_logarithm_of_their_number_at_any_scale(storage: str, scale: float) -> None:
    """Every cosine is 1, so that every tile's sum is as large as it can be: loss log(C), gradients 0."""
    head = ShardedMarginHead(5000, 3, Margin(), scale, storage=storage, optimizer=SGD(0.1), tile=4096)
    head.set_centers(torch.tensor([[0.0, 2.0, 0.0]]).expand(5000, 3))
    x = torch.tensor([[0.0, 7.0, 0.0]]).repeat(3, 1).requires_grad_()
    loss = head(x, torch.tensor([0, 4095, 4999]))
    loss.backward()
    assert loss.item() == pytest.approx(log(5000), rel=1e-5 * scale if storage == "float32" else 1e-9)
    assert head.skipped == 0 and x.grad.abs().max() < 1e-4


@pytest.mark.parametrize("scale", [60.0, 70.0, 76.0])
def test_heavy_weights_of_rarely_drawn_classes_fit_too(scale: float) -> None:
    """log(1/r) of a rate of one in ten million is as much as 16 of scale."""
    head = ShardedMarginHead(
        5000, 3, Margin(), scale, storage="float32", optimizer=SGD(0.1), active=sampled(1e-7, unbiased=True)
    )
    head.set_centers(torch.tensor([[0.0, 2.0, 0.0]]).expand(5000, 3))
    drawn = torch.arange(5000)

    def everybody(given: Any) -> ActiveRows:
        weight = torch.full((5000,), -log(1e-7))
        weight[0] = 0.0
        return ActiveRows(drawn, weight, -log(1e-7))

    head.gate.select = everybody
    loss = head(torch.tensor([[0.0, 7.0, 0.0]]).requires_grad_(), torch.tensor([0]))
    assert loss.item() == pytest.approx(log(4999e7 + 1), rel=1e-4)


def test_the_gate_says_how_heavy_its_weights_are() -> None:
    head = ShardedMarginHead(500, 3, optimizer=SGD(0.1), active=sampled(0.01, unbiased=True))
    given = GateInput(torch.eye(3)[:1], torch.tensor([7]), torch.tensor([7]), 0)
    active = head.gate.select(given)
    assert (
        active.heaviest == pytest.approx(log(100))
        and float(active.log_weight.max()) <= active.heaviest + 1e-6
    )
