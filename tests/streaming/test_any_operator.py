"""Any ATen operator in any layout: equal to the whole image, or refused by its name and its module's."""

import pytest
import torch
from any_operator import AnyNetwork, usable
from any_operator_oracle import limited, outcome
from operator_table import OPERATORS


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_equal_or_refused(first: int) -> None:
    for seed in range(first, first + 6):
        outcome(seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_equal_or_refused_very_often() -> None:
    for seed in range(1000, 2000):
        outcome(seed)


@torch.no_grad()
def test_every_operator_is_drawn() -> None:
    def runs(name: str, seed: int) -> bool:
        model = AnyNetwork(seed, name)
        try:
            return usable(model(torch.randn(1, *model.shape, dtype=torch.float64)))
        except Exception:  # not every operator takes every value
            return False

    assert len(OPERATORS) >= 200
    never = [name for name in OPERATORS if not any(runs(name, seed) for seed in range(200))]
    assert not never


def test_a_draw_is_replayed() -> None:
    model = AnyNetwork(5, "add")
    image = torch.randn(1, *model.shape, dtype=torch.float64)
    assert torch.equal(model(image), model(image))


def test_time_is_limited() -> None:
    def for_ever() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError), limited(0.1):
        for_ever()
