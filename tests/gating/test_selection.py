import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import Anneal, ExpertChoice, Threshold, TopK, expert_choice, threshold, top_k


@given(st.integers(0, 12))
def test_k_is_annealed_and_rounded_up(step: int) -> None:
    scores = torch.rand(3, 8)
    k = {0: 6, 1: 6, 2: 5, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2, 9: 2}.get(step, 1)
    mask = TopK(Anneal(6, 1, 10)).select(scores, step=step)
    assert torch.equal(mask, top_k(scores, k))


def test_a_threshold_remembers_only_what_it_is_given() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1]])
    before = torch.tensor([[False, True, True]])
    selection = Threshold(0.6, gap=0.2)
    assert selection.select(scores).tolist() == [[True, False, False]]
    assert selection.select(scores, previous=before).tolist() == [[True, True, False]]
    annealed = Threshold(Anneal(0.0, 0.6, 10))
    assert torch.equal(annealed.select(scores, step=5), threshold(scores, 0.3))


@given(st.integers(0, 30), st.sampled_from([0.0, 0.07, 0.25, 0.5, 1.0]))
def test_a_share_is_a_budget_of_tokens(num_tokens: int, share: float) -> None:
    scores = torch.rand(num_tokens, 2)
    mask = ExpertChoice(share).select(scores)
    capacity = -(-round(share * 100) * num_tokens // 100)  # in integers
    assert torch.equal(mask, expert_choice(scores, capacity))
    assert (mask.sum(0) == capacity).all()


def test_a_budget_is_annealed() -> None:
    scores = torch.rand(8, 1)
    selection = ExpertChoice(Anneal(1.0, 0.25, 4))
    assert [int(selection.select(scores, step=s).sum()) for s in range(6)] == [8, 7, 5, 4, 2, 2]


def test_expert_choice_has_no_room_for_forced_pairs() -> None:
    with pytest.raises(ValueError, match="no forced pairs"):
        ExpertChoice(0.5).select(torch.rand(2, 2), force=torch.ones(2, 2, dtype=torch.bool))
