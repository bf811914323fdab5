"""Selections against a loop over tokens that sorts by (-score, id)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigvision.gating import expert_choice, threshold, top_k


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties (also infinite ones), a forced mask and an allowed mask that holds it."""
    t, e = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    values = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0, torch.inf])
    scores = torch.tensor(draw(st.lists(values, min_size=t * e, max_size=t * e))).reshape(t, e)
    kinds = draw(st.lists(st.sampled_from("fan"), min_size=t * e, max_size=t * e))
    force = torch.tensor([kind == "f" for kind in kinds], dtype=torch.bool).reshape(t, e)
    allowed = torch.tensor([kind != "n" for kind in kinds], dtype=torch.bool).reshape(t, e)
    return scores, force, allowed


def slow_top_k(scores: Tensor, ks: list[int], force: Tensor, allowed: Tensor) -> Tensor:
    mask = force.clone()
    for t, k in enumerate(ks):
        free = [e for e in range(scores.shape[1]) if allowed[t, e] and not force[t, e]]
        free.sort(key=lambda e: (-float(scores[t, e]), e))
        for e in free[: max(k - int(force[t].sum()), 0)]:
            mask[t, e] = True
    return mask


@given(tables(), st.integers(0, 8))
def test_top_k_is_the_loop(table: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    scores, force, allowed = table
    mask = top_k(scores, k, force=force, allowed=allowed)
    assert torch.equal(mask, slow_top_k(scores, [k] * len(scores), force, allowed))
    expected = torch.minimum(allowed.sum(1), force.sum(1).clamp(min=k))
    assert torch.equal(mask.sum(1), expected)
    assert (force <= mask).all() and (mask <= allowed).all()


@given(tables(), st.integers(0, 8))
def test_top_k_with_one_mask_or_none(table: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    scores, force, allowed = table
    none, every = torch.zeros_like(force), torch.ones_like(force)
    ks = [k] * len(scores)
    assert torch.equal(top_k(scores, k), slow_top_k(scores, ks, none, every))
    assert torch.equal(top_k(scores, k, force=force), slow_top_k(scores, ks, force, every))
    assert torch.equal(top_k(scores, k, allowed=allowed), slow_top_k(scores, ks, none, allowed))


@given(tables(), st.data())
def test_every_token_may_have_its_own_k(table: tuple[Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    scores, force, allowed = table
    ks = data.draw(st.lists(st.integers(0, 7), min_size=len(scores), max_size=len(scores)))
    mask = top_k(scores, torch.tensor(ks, dtype=torch.int64), force=force, allowed=allowed)
    assert torch.equal(mask, slow_top_k(scores, ks, force, allowed))


def test_forced_but_not_allowed_is_refused() -> None:
    scores = torch.zeros(2, 3)
    force = torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    for select in (
        lambda: top_k(scores, 1, force=force, allowed=~force),
        lambda: threshold(scores, 0.0, force=force, allowed=~force),
    ):
        with pytest.raises(
            ValueError, match="1 pairs are forced but not allowed, the first: token 1, expert 1"
        ):
            select()


def test_nan_scores_are_refused_unless_not_allowed() -> None:
    scores = torch.tensor([[0.0, torch.nan]])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        top_k(scores, 1)
    allowed = torch.tensor([[True, False]])
    assert torch.equal(top_k(scores, 2, allowed=allowed), allowed)


@given(tables(), st.sampled_from([-1.0, 0.0, 0.5]), st.sampled_from([0.0, 0.5]), st.data())
def test_threshold_with_hysteresis(
    table: tuple[Tensor, Tensor, Tensor], tau: float, gap: float, data: st.DataObject
) -> None:
    scores, force, allowed = table
    bits = data.draw(st.lists(st.booleans(), min_size=scores.numel(), max_size=scores.numel()))
    previous = torch.tensor(bits, dtype=torch.bool).reshape(scores.shape)
    mask = threshold(scores, tau, tau_off=tau - gap, previous=previous, force=force, allowed=allowed)
    for t in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            bar = tau - gap if previous[t, e] else tau
            assert mask[t, e] == (force[t, e] or (allowed[t, e] and scores[t, e] >= bar))


def test_hysteresis_holds_a_wavering_score() -> None:
    previous = torch.zeros(1, 1, dtype=torch.bool)
    seen = []
    for score in (0.4, 0.6, 0.45, 0.35, 0.25, 0.45):
        previous = threshold(torch.tensor([[score]]), 0.5, tau_off=0.3, previous=previous)
        seen.append(bool(previous))
    assert seen == [False, True, True, True, False, False]


def test_threshold_refuses_half_a_hysteresis_and_a_crossed_one() -> None:
    scores = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="both tau_off and previous"):
        threshold(scores, 0.5, tau_off=0.2)
    with pytest.raises(ValueError, match=r"got 0\.7 > 0\.5"):
        threshold(scores, 0.5, tau_off=0.7, previous=scores > 0)


@given(tables(), st.integers(0, 12))
def test_expert_choice_columns_are_within_capacity(
    table: tuple[Tensor, Tensor, Tensor], capacity: int
) -> None:
    scores, _, allowed = table
    mask = expert_choice(scores, capacity, allowed=allowed)
    none = torch.zeros_like(allowed).t()
    ks = [capacity] * scores.shape[1]
    assert torch.equal(mask.t(), slow_top_k(scores.t(), ks, none, allowed.t()))
    assert torch.equal(mask.sum(0), allowed.sum(0).clamp(max=capacity))


def test_expert_choice_takes_a_capacity_per_expert() -> None:
    scores = torch.tensor([[3.0, 0.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    mask = expert_choice(scores, torch.tensor([2, 0, 1]))
    assert mask.tolist() == [[True, False, True], [True, False, False], [False, False, False]]


def test_masks_of_the_wrong_shape_or_dtype_are_refused() -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"force must be bool \[2, 3\], got torch.float32 \[2, 3\]"):
        top_k(scores, 1, force=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"allowed must be bool \[2, 3\], got torch.bool \[3\]"):
        expert_choice(scores, 1, allowed=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        top_k(scores, -1)
    with pytest.raises(ValueError, match="k must be at least 0, got -2"):
        top_k(scores, torch.tensor([1, -2]))
    with pytest.raises(ValueError, match=r"k must be int64 \[2\], got torch.int64 \[3\]"):
        top_k(scores, torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match=r"capacity must be int64 \[3\], got torch.float32 \[3\]"):
        expert_choice(scores, torch.ones(3))
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        expert_choice(scores, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=r"scores are float \[T, E\], got torch.int64 \[2\]"):
        top_k(torch.zeros(2, dtype=torch.int64), 1)
