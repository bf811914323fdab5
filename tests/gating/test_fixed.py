import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import BucketScorer, RandomScorer, TableScorer, TreeScorer, top_k


def test_a_table_gives_each_task_its_row() -> None:
    table = torch.randn(3, 4)
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(TableScorer(table)(ids), table[[2, 0, 2]])
    assert TableScorer(table)(ids[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match=r"in \[0, 3\), got 0 to 3"):
        TableScorer(table)(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"int64 \[T\], got torch.float32 \[1\]"):
        TableScorer(table)(torch.zeros(1))
    with pytest.raises(ValueError, match=r"float \[I, E\], got torch.int64 \[2\]"):
        TableScorer(torch.arange(2))


@given(st.integers(1, 9), st.integers(0, 3))
def test_a_bucket_is_one_expert_and_always_the_same(num_experts: int, seed: int) -> None:
    ids = torch.tensor([-5, 0, 1, 2**62, 1])
    scores = BucketScorer(num_experts, seed=seed)(ids)
    assert scores.shape == (5, num_experts) and (scores.sum(1) == 1).all()
    assert torch.equal(scores[2], scores[4])
    assert torch.equal(scores, BucketScorer(num_experts, seed=seed)(ids))


def test_buckets_are_even() -> None:
    share = BucketScorer(7)(torch.arange(70000)).mean(0)
    assert ((share - 1 / 7).abs() < 0.006).all()  # 4.5 standard deviations
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BucketScorer(0)


@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 99))
def test_a_tree_is_the_walk_from_its_root(depth: int, num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = 2**depth - 1
    feature = torch.randint(0, 3, (nodes,), generator=generator)
    cut = torch.randn(nodes, generator=generator)
    x = torch.randn(num_tokens, 3, generator=generator)
    scores = TreeScorer(feature, cut)(x)
    assert scores.shape == (num_tokens, 2**depth)
    for t in range(num_tokens):
        leaf, node = 0, 0
        for _ in range(depth):
            right = bool(x[t, feature[node]] > cut[node])
            leaf, node = 2 * leaf + right, 2 * node + 1 + right
        assert scores[t].argmax() == leaf and scores[t].sum() == 1


@pytest.mark.parametrize("nodes", [0, 2, 4])
def test_a_tree_that_is_not_full_is_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=rf"got \[{nodes}\]"):
        TreeScorer(torch.zeros(nodes, dtype=torch.int64), torch.zeros(nodes))


def test_a_fixed_random_subnetwork_belongs_to_its_task() -> None:
    scorer = RandomScorer(seed=0, num_experts=64)
    tasks = torch.tensor([5, 9, 5])
    masks = top_k(scorer(tasks, token_ids=tasks), 16)
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert (masks.sum(1) == 16).all()
