"""Pairs, rows and capacity against a loop over tokens."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigvision.gating import (
    Routing,
    combine,
    dense_weights,
    dispatch,
    gather_rows,
    normalize,
    route,
    rows,
    sum_rows,
    top_k,
)


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A mask and probabilities with ties."""
    t, e = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    bits = draw(st.lists(st.booleans(), min_size=t * e, max_size=t * e))
    levels = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=t * e, max_size=t * e))
    return torch.tensor(bits, dtype=torch.bool).reshape(t, e), torch.tensor(levels).reshape(t, e)


def slow_pairs(
    mask: Tensor, probs: Tensor, capacity: list[int] | None, priority: str
) -> list[list[tuple[int, float]]]:
    """For each expert the (token, weight) it keeps."""
    kept = []
    for e in range(mask.shape[1]):
        pairs = [(t, float(probs[t, e])) for t in range(len(mask)) if mask[t, e]]
        if capacity is not None:
            if priority == "score":
                pairs.sort(key=lambda pair: (-pair[1], pair[0]))
            pairs = sorted(pairs[: capacity[e]])
        kept.append(pairs)
    return kept


@given(
    decisions(),
    st.one_of(st.none(), st.lists(st.integers(0, 12), min_size=5, max_size=5)),
    st.sampled_from(["position", "score"]),
)
def test_pairs_are_the_loop(
    decision: tuple[Tensor, Tensor], room: list[int] | None, priority: Literal["position", "score"]
) -> None:
    mask, probs = decision
    e = mask.shape[1]
    capacity = None if room is None else torch.tensor(room[:e])
    routing = route(mask, probs, capacity=capacity, priority=priority)
    expected = slow_pairs(mask, probs, None if room is None else room[:e], priority)
    assert routing.token.tolist() == [t for pairs in expected for t, _ in pairs]
    assert routing.weight.tolist() == [w for pairs in expected for _, w in pairs]
    assert routing.counts.tolist() == [len(pairs) for pairs in expected]
    assert torch.equal(routing.counts + routing.dropped, mask.sum(0))
    assert routing.num_tokens == len(mask) and routing.num_experts == e
    assert routing.counts.sum() == len(routing.token)
    pairs = list(zip(routing.expert.tolist(), routing.token.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert (routing.token.dtype, routing.counts.dtype, routing.dropped.dtype) == (torch.int64,) * 3
    assert routing.weight.dtype == torch.float32


@given(decisions(), st.integers(0, 3))
def test_renormalized_weights_of_kept_pairs_sum_to_one(
    decision: tuple[Tensor, Tensor], capacity: int
) -> None:
    mask, probs = decision
    routing = route(mask, probs + 0.125, renormalize=True, capacity=capacity)
    total = torch.zeros(len(mask)).index_add_(0, routing.token, routing.weight)
    has_pair = torch.zeros(len(mask), dtype=torch.bool).index_fill_(0, routing.token, True)
    torch.testing.assert_close(total, has_pair.float())
    zero = route(mask, torch.zeros_like(probs), renormalize=True)
    assert (zero.weight == 0).all()


@given(decisions(), st.lists(st.integers(0, 3), max_size=3))
def test_dispatch_and_combine_are_the_loop(decision: tuple[Tensor, Tensor], tail: list[int]) -> None:
    mask, probs = decision
    routing = route(mask, probs)
    x = torch.randn(len(mask), *tail)
    sent = dispatch(x, routing)
    assert sent.shape == (len(routing.token), *tail)
    for row, token in zip(sent, routing.token.tolist(), strict=True):
        assert torch.equal(row, x[token])
    y = torch.randn(len(routing.token), *tail)
    out = combine(y, routing)
    expected = torch.zeros(len(mask), *tail)
    for row, token, weight in zip(y, routing.token.tolist(), routing.weight.tolist(), strict=True):
        expected[token] += row * weight
    torch.testing.assert_close(out, expected)


@given(decisions())
def test_combine_undoes_dispatch_when_weights_sum_to_one(decision: tuple[Tensor, Tensor]) -> None:
    mask, probs = decision
    mask = mask.clone()
    mask[:, 0] = True
    x = torch.randn(len(mask), 3)
    routing = route(mask, probs + 0.125, renormalize=True)
    torch.testing.assert_close(combine(dispatch(x, routing), routing), x)


@given(decisions())
def test_with_unit_weights_combine_is_the_adjoint_of_dispatch(decision: tuple[Tensor, Tensor]) -> None:
    mask, _ = decision
    routing = route(mask, torch.ones(mask.shape, dtype=torch.float64))
    x = torch.randn(len(mask), 4, dtype=torch.float64)
    y = torch.randn(len(routing.token), 4, dtype=torch.float64)
    torch.testing.assert_close((dispatch(x, routing) * y).sum(), (x * combine(y, routing)).sum())


@given(decisions(), st.integers(0, 99), st.integers(0, 4))
def test_equivariance_to_the_order_of_tokens(
    decision: tuple[Tensor, Tensor], seed: int, capacity: int
) -> None:
    mask, _ = decision
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(mask.shape, generator=generator)  # no ties
    order = torch.randperm(len(mask), generator=generator)
    weights = dense_weights(route(mask, probs, capacity=capacity, priority="score"))
    permuted = dense_weights(route(mask[order], probs[order], capacity=capacity, priority="score"))
    assert torch.equal(permuted, weights[order])


@given(decisions(), st.integers(0, 99), st.integers(0, 4), st.sampled_from(["position", "score"]))
def test_equivariance_to_the_order_of_experts(
    decision: tuple[Tensor, Tensor], seed: int, capacity: int, priority: Literal["position", "score"]
) -> None:
    mask, probs = decision
    order = torch.randperm(mask.shape[1], generator=torch.Generator().manual_seed(seed))
    weights = dense_weights(route(mask, probs, capacity=capacity, priority=priority))
    permuted = dense_weights(route(mask[:, order], probs[:, order], capacity=capacity, priority=priority))
    assert torch.equal(permuted, weights[:, order])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("capacity", [None, 1])
def test_gradients(renormalize: bool, capacity: int | None) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    mask = top_k(logits, 2)

    def gated(x: Tensor, logits: Tensor) -> Tensor:
        routing = route(mask, normalize(logits), renormalize=renormalize, capacity=capacity)
        return combine(dispatch(x, routing).square(), routing)

    assert torch.autograd.gradcheck(gated, (x, logits))
    assert torch.autograd.gradgradcheck(gated, (x, logits))


def test_only_selected_pairs_get_a_gradient() -> None:
    probs = torch.rand(5, 4, requires_grad=True)
    mask = top_k(probs, 2)
    route(mask, probs).weight.sum().backward()
    assert probs.grad is not None and torch.equal(probs.grad != 0, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 1 + 256 * 2**-8 is 2; added one by one in bf16, each 2**-8 is lost.
    mask = torch.ones(1, 257, dtype=torch.bool)
    routing = route(mask, torch.ones(1, 257))
    y = torch.full((257, 1), 2.0**-8, dtype=dtype)
    y[0] = 1
    out = combine(y, routing)
    assert out.dtype == dtype and float(out) == 2.0
    x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    dispatch(x, routing).backward(y)
    assert x.grad is not None and x.grad.dtype == dtype and float(x.grad) == 2.0


@given(st.lists(st.integers(0, 3), max_size=12))
def test_the_order_without_atomics_is_the_plain_sum(index: list[int]) -> None:
    ids = torch.tensor(index, dtype=torch.int64)
    layers = rows._layers(ids, 4)
    values = torch.randn(len(index), 2, dtype=torch.float64)
    plain = sum_rows(values, ids, 4)
    with pytest.MonkeyPatch.context() as patch:  # as on an accelerator
        patch.setattr(rows, "_adds_in_order", lambda device: False)
        assert torch.equal(sum_rows(values, ids, 4), plain)
    assert sorted(torch.cat([*layers, ids[:0]]).tolist()) == list(range(len(index)))
    for layer in layers:
        assert len(ids[layer].unique()) == len(layer)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for layer in layers:
        expected.index_add_(0, ids[layer], values[layer])
    assert torch.equal(sum_rows(values, ids, 4), expected)
    assert gather_rows(expected, ids).shape == (len(index), 2)


def test_bad_input_is_refused_with_its_values() -> None:
    mask, probs = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"got torch.float32 \[2, 3\] and \[2, 3\]"):
        route(probs, probs)
    with pytest.raises(ValueError, match=r"got torch.bool \[2, 3\] and \[3, 2\]"):
        route(mask, probs.t())
    with pytest.raises(ValueError, match="'random'"):
        route(mask, probs, capacity=1, priority="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        route(mask, probs, capacity=-1)
    routing: Routing = route(mask, probs)
    with pytest.raises(ValueError, match=r"of 2 tokens, x has \[3, 1\]"):
        dispatch(torch.zeros(3, 1), routing)
    with pytest.raises(ValueError, match=r"6 pairs, y has \[2, 1\]"):
        combine(torch.zeros(2, 1), routing)
