"""Counter-based numbers against SplitMix64 in Python integers, and against probability."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigvision.gating import (
    RandomScorer,
    counter,
    counter_bits,
    counter_gumbel,
    counter_key,
    counter_normal,
    counter_uniform,
    random_scores,
    threshold,
)

WORD = 2**64
KINDS = [counter_bits, counter_uniform, counter_normal, counter_gumbel]


def splitmix(state: int) -> int:
    """The published finaliser, on unsigned integers."""
    z = state % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def slow_bits(key: int, token: int, expert: int) -> int:
    golden = 0x9E3779B97F4A7C15
    return splitmix(splitmix(key + token * golden) + expert * golden)


def test_the_finaliser_is_splitmix64() -> None:
    # The first outputs of the reference generator from seed 1234567 (as in Rosetta Code's "Pseudo-random
    # numbers/Splitmix64"): its state grows by the golden ratio before each.
    state, seen = 1234567, []
    for _ in range(5):
        state += 0x9E3779B97F4A7C15
        seen.append(splitmix(state))
    assert seen == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(
    st.integers(0, WORD - 1),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.integers(0, 10**7),
    st.integers(0, 5),
)
def test_bits_are_the_loop(key: int, tokens: list[int], start: int, width: int) -> None:
    bits = counter_bits(key, torch.tensor(tokens, dtype=torch.int64), start, start + width)
    assert bits.shape == (len(tokens), width)
    for t, token in enumerate(tokens):
        for e in range(width):
            assert int(bits[t, e]) % WORD == slow_bits(key, token, start + e)


@pytest.mark.parametrize("draw", KINDS)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5), st.integers(1, 64))
def test_a_slice_and_any_block_size_agree_with_the_whole(
    draw: Callable[..., Tensor], a: int, b: int, num_tokens: int, block: int
) -> None:
    start, stop = sorted((a, b))
    ids = torch.arange(num_tokens) * 3 + 7
    whole = draw(5, ids, 0, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counter, "_CPU_BLOCK", block)
        assert torch.equal(draw(5, ids, start, stop), whole[:, start:stop])
        assert torch.equal(draw(5, ids[1:], 0, 40), whole[1:])


def test_keys_differ_by_order_and_length() -> None:
    keys = [
        counter_key(),
        counter_key(0),
        counter_key(0, 0),
        counter_key(0, 1),
        counter_key(1, 0),
        counter_key(1),
    ]
    keys += [counter_key(-1), counter_key(WORD - 2)]
    assert len(set(keys)) == len(keys)
    assert counter_key(3, 4) == counter_key(3, 4)


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    u = counter_uniform(counter_key(1), torch.arange(300), 0, 1000).double()
    assert u.min() >= 0 and u.max() < 1
    # The Kolmogorov distance of n uniform numbers exceeds 1.95 / sqrt(n) once in a thousand seeds.
    ordered = u.flatten().sort().values
    grid = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (ordered - grid).abs().max() < 1.95 / math.sqrt(len(ordered))
    centred = (u - 0.5) * math.sqrt(12)
    for dt, de in ((0, 1), (1, 0), (1, 1), (5, 7)):
        product = centred[dt:, de:] * centred[: 300 - dt, : 1000 - de]
        assert abs(product.mean()) < 4 / math.sqrt(product.numel())


@pytest.mark.parametrize(
    "draw, mean, variance",
    [(counter_normal, 0.0, 1.0), (counter_gumbel, 0.5772156649, math.pi**2 / 6)],
)
def test_normal_and_gumbel_have_their_moments(
    draw: Callable[..., Tensor], mean: float, variance: float
) -> None:
    x = draw(counter_key(2), torch.arange(400), 0, 1000).double()
    assert x.isfinite().all()
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / x.numel())
    assert abs(x.var() - variance) < 0.02


def test_gumbel_stays_finite_at_both_ends_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0.0, 1 - 2.0**-24]])
    monkeypatch.setattr(counter, "counter_uniform", lambda *_: ends)
    low, high = counter_gumbel(0, torch.arange(1), 0, 2).flatten().tolist()
    assert low == pytest.approx(-math.log(25 * math.log(2)), rel=1e-5)
    assert high == pytest.approx(25 * math.log(2), rel=1e-5)


def test_ten_million_classes_are_active_at_the_rate_asked_for() -> None:
    num_classes, rate = 10**7, 0.1
    token = torch.zeros(1, dtype=torch.int64)
    scores = random_scores(7, 3, token, (0, num_classes))
    active = threshold(scores, 1 - rate)
    deviation = math.sqrt(num_classes * rate * (1 - rate))
    assert abs(int(active.sum()) - num_classes * rate) < 5 * deviation
    shard = random_scores(7, 3, token, range(4_999_999, 5_100_001))
    assert torch.equal(shard, scores[:, 4_999_999:5_100_001])


def test_scores_depend_on_seed_step_stream_and_token_only() -> None:
    scorer = RandomScorer(seed=4, num_experts=6)
    x = torch.randn(5, 3)
    base = scorer(x, step=2)
    assert torch.equal(base, RandomScorer(4, 6)(torch.zeros(5, 0), step=2))
    ids = torch.tensor([4, 0])
    assert torch.equal(scorer(x[:2], step=2, token_ids=ids), base[ids])
    assert torch.equal(scorer(x, step=2, experts=(1, 4)), base[:, 1:4])
    others = [scorer(x, step=3), RandomScorer(5, 6)(x, step=2)]
    others.append(random_scores(4, 2, torch.arange(5), (0, 6), stream=1))
    assert all((other != base).all() for other in others)


def test_ranges_and_ids_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\) is no range"):
        counter_uniform(0, torch.arange(2), 3, 2)
    with pytest.raises(ValueError, match=r"int64 \[T\], got torch.float32 \[2\]"):
        counter_bits(0, torch.zeros(2), 0, 1)
