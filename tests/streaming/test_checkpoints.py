"""The checkpoint planner against brute force, and its budgets."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigvision.streaming.checkpoints import (
    BudgetError,
    StepBytes,
    advance,
    first_states,
    plan_checkpoints,
    recomputed_steps,
)


@cache
def fewest(n: int, s: int) -> int:
    """Forward steps that differentiating n steps takes with s states, every split tried."""
    if n == 1:
        return 0
    if s == 1:
        return n * (n - 1) // 2
    return min(m + fewest(n - m, s - 1) + fewest(m, s) for m in range(1, n))


def taken(n: int, s: int) -> int:
    """The same with the splits that `advance` chooses."""
    if n == 1:
        return 0
    if s == 1:
        return n * (n - 1) // 2
    m = advance(n, s)
    assert 1 <= m < n
    return m + taken(n - m, s - 1) + taken(m, s)


@pytest.mark.parametrize("s", [1, 2, 3, 5, 8, 13])
def test_no_schedule_repeats_fewer_steps(s: int) -> None:
    for n in range(1, 48):
        assert taken(n, s) == fewest(n, s) == recomputed_steps(n, s) + n - 1


@given(n=st.integers(1, 3000), s=st.integers(1, 100))
def test_the_first_pass_keeps_no_more_than_it_may(n: int, s: int) -> None:
    states = first_states(n, s)
    assert states[0] == 0
    assert states == sorted(set(states))
    assert len(states) <= min(s, n)
    assert states[-1] < n
    if s >= n:
        assert recomputed_steps(n, s) == 0
        assert len(states) == n


def test_the_size_that_the_design_expects() -> None:
    # 235 steps with 16 states on disk and 16 in memory: two levels, one more forward at most.
    assert recomputed_steps(235, 33) <= 235


MIB = 2**20
CHOICES = [StepBytes(64, 100, 10 * MIB, 200 * MIB), StepBytes(128, 50, 12 * MIB, 390 * MIB)]


def test_memory_first_then_disk_then_recomputation() -> None:
    free = plan_checkpoints(CHOICES, None)
    assert (free.rows, free.in_memory, free.on_disk, free.recomputed) == (128, 49, 0, 0)
    tight = plan_checkpoints(CHOICES, 300 * MIB)
    assert (tight.rows, tight.in_memory, tight.on_disk) == (64, 10, 0)
    assert 0 < tight.recomputed <= 150
    assert tight.peak_bytes <= 300 * MIB
    spilled = plan_checkpoints(CHOICES, 300 * MIB, scratch=500 * MIB)
    assert (spilled.in_memory, spilled.on_disk) == (10, 50)
    assert spilled.recomputed < tight.recomputed
    assert spilled.disk_bytes <= 500 * MIB


def test_a_budget_that_cannot_be_met_names_the_least_that_can() -> None:
    with pytest.raises(BudgetError, match=r"with 64 rows a step it takes 200.0 MiB"):
        plan_checkpoints(CHOICES, 199 * MIB)
    assert plan_checkpoints(CHOICES, 200 * MIB).in_memory == 0
