import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import HashScorer, collision_counts, hash_codes, hash_planes, union_collisions


@pytest.mark.parametrize("angle", [0.2, 1.0, math.pi / 2, 2.5])
def test_collisions_per_bit_follow_one_minus_angle_over_pi(angle: float) -> None:
    tables = 20000
    x = torch.tensor([[1.0, 0, 0], [math.cos(angle), math.sin(angle), 0]])
    codes = hash_codes(x, hash_planes(0, 3, tables, 1), 1)
    rate = float((codes[0] == codes[1]).double().mean())
    p = 1 - angle / math.pi
    assert abs(rate - p) < 4.5 * math.sqrt(p * (1 - p) / tables)


def test_a_code_of_several_bits_collides_with_the_power_of_one_bit() -> None:
    tables, bits, angle = 20000, 4, 0.5
    x = torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)]])
    codes = hash_codes(x, hash_planes(1, 2, tables, bits), bits)
    p = (1 - angle / math.pi) ** bits
    rate = float((codes[0] == codes[1]).double().mean())
    assert abs(rate - p) < 4.5 * math.sqrt(p * (1 - p) / tables)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 24), st.integers(0, 9))
def test_scores_and_the_union_are_the_loop(t: int, e: int, tables: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, keys = torch.randn(t, 3, generator=generator), torch.randn(e, 3, generator=generator)
    scorer = HashScorer(3, tables, bits, seed=seed, keys=keys)
    scores, union = scorer(x), scorer.union(x)
    side_x, side_k = x @ scorer.planes >= 0, keys @ scorer.planes >= 0
    expected = torch.zeros(t, e)
    union_expected = torch.zeros(1, e)
    for table in range(tables):
        part = slice(table * bits, (table + 1) * bits)
        for j in range(e):
            hits = [bool((side_x[i, part] == side_k[j, part]).all()) for i in range(t)]
            expected[:, j] += torch.tensor(hits, dtype=torch.float32)
            union_expected[0, j] += any(hits)
    assert torch.equal(scores, expected)
    assert torch.equal(union, union_expected)
    assert torch.equal(collision_counts(scorer.codes(x), scorer.codes(keys)), expected)
    assert torch.equal(union_collisions(scorer.codes(x), scorer.codes(keys), bits), union_expected)


def test_equal_vectors_always_collide_and_opposite_ones_never() -> None:
    x = torch.randn(50, 8)
    scorer = HashScorer(8, tables=3, bits=5, keys=torch.cat([x, -x]))
    scores = scorer(x)
    assert (scores.diagonal() == 3).all()
    assert (scores[:, 50:].diagonal() == 0).all()


def test_length_does_not_matter_and_nothing_is_learnt() -> None:
    x = torch.randn(20, 6)
    scorer = HashScorer(6, 4, 8, seed=2)
    assert torch.equal(scorer.codes(x), scorer.codes(x * 100))
    assert not list(scorer.parameters())
    assert torch.equal(scorer.codes(x), HashScorer(6, 4, 8, seed=2).codes(x))
    assert not torch.equal(scorer.codes(x), HashScorer(6, 4, 8, seed=3).codes(x))


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match="at most 24, got 3, 1, 25"):
        HashScorer(3, 1, 25)
    with pytest.raises(ValueError, match=r"got \[2, 4\] and \[3, 6\]"):
        HashScorer(3, 2, 3).codes(torch.zeros(2, 4))


def test_codes_are_exact_in_a_network_cast_to_bf16() -> None:
    """Sixteen bits of a code don't fit a bf16 number: computed there, codes run together."""
    scorer = HashScorer(8, 2, 16).bfloat16()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    sides = (x @ scorer.planes >= 0).view(64, 2, 16).tolist()
    expected = [[sum(bit << i for i, bit in enumerate(code)) for code in row] for row in sides]
    assert scorer.codes(x).tolist() == expected
