"""The gate: what pushes a selection never changes a weight, and nothing changes unless it is told to."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import (
    Anneal,
    BiasBalancer,
    ExpertChoice,
    Gate,
    LinearScorer,
    Noise,
    RandomScorer,
    StickyScores,
    Threshold,
    TopK,
    dense_weights,
    normalize,
    random_scores,
    route,
    straight_through,
    top_k,
)

NUM_EXPERTS = 5


def pushed_gate(kind: str = "gaussian", **options: Any) -> Gate:
    """A gate with every push there is, after a few steps of training."""
    gate = Gate(
        LinearScorer(3, NUM_EXPERTS),
        options.pop("selection", TopK(2)),
        noise=Noise(kind, 5.0),  # type: ignore[arg-type]
        balancer=BiasBalancer(NUM_EXPERTS, rate=0.1),
        sticky=StickyScores(20, NUM_EXPERTS),
        **options,
    )
    for _ in range(3):
        gate.observe(gate(torch.randn(20, 3), items=torch.arange(20)))
        gate.advance()
    return gate


@given(st.sampled_from(["gaussian", "gumbel", "jitter"]), st.integers(0, 20), st.integers(0, 9))
def test_pushes_never_change_the_weight_of_a_pair_that_stays(kind: str, num_tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    gate = pushed_gate(kind)
    x, items = torch.randn(num_tokens, 3), torch.arange(num_tokens)
    pushed = gate(x, items=items)
    probs = normalize(gate.scorer(x))
    plain = route(top_k(probs, 2), probs)
    have, want = dense_weights(pushed.routing), dense_weights(plain)
    both = (have > 0) & (want > 0)
    assert torch.equal(have[both], want[both])
    assert torch.equal(pushed.probs, probs)


def test_pushes_do_change_selections() -> None:
    torch.manual_seed(0)
    gate = pushed_gate()
    x = torch.randn(20, 3)
    plain = top_k(normalize(gate.scorer(x)), 2)
    assert (gate(x, items=torch.arange(20)).mask != plain).any()


def state(gate: Gate) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gate.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_forward_changes_no_state_and_repeats_itself() -> None:
    gate = pushed_gate()
    x, items = torch.randn(20, 3), torch.arange(20)
    before = state(gate)
    first, second = gate(x, items=items), gate(x, items=items)
    assert torch.equal(first.mask, second.mask) and torch.equal(first.noisy_logits, second.noisy_logits)
    assert same(state(gate), before)
    gate.observe(first)
    gate.advance()
    assert not same(state(gate), before)


def test_eval_adds_no_noise_and_changes_no_state() -> None:
    gate = pushed_gate().eval()
    x, items = torch.randn(20, 3), torch.arange(20)
    before = state(gate)
    gated = gate(x, items=items)
    gate.observe(gated)
    gate.advance()
    assert same(state(gate), before)
    assert torch.equal(gated.noisy_logits, gated.logits)
    bare = Gate(gate.scorer, TopK(2), noise=Noise("gumbel", 100.0)).eval()
    assert torch.equal(bare(x).mask, top_k(bare(x).probs, 2))


def test_steps_draw_new_noise_and_ranks_draw_their_tokens() -> None:
    gate = Gate(LinearScorer(3, NUM_EXPERTS), TopK(2), noise=Noise("gumbel"))
    x = torch.randn(20, 3)
    whole = gate(x)
    part = gate(x[7:], token_ids=torch.arange(7, 20))
    assert torch.equal(part.mask, whole.mask[7:])
    gate.advance()
    assert not torch.equal(gate(x).mask, whole.mask)


def test_ties_give_the_same_mask_again() -> None:
    gate = Gate(lambda x: torch.zeros(len(x), 4), TopK(2))
    assert gate(torch.zeros(3, 1)).mask.tolist() == [[True, True, False, False]] * 3


def test_state_survives_a_round_trip() -> None:
    gate, fresh = pushed_gate(), pushed_gate()
    fresh.load_state_dict(gate.state_dict())
    x = torch.randn(20, 3)
    assert fresh.step == gate.step == 3
    assert torch.equal(fresh(x, items=torch.arange(20)).scores, gate(x, items=torch.arange(20)).scores)


def test_force_and_allowed_reach_selection_and_probabilities() -> None:
    x = torch.randn(6, 3)
    force = torch.zeros(6, NUM_EXPERTS, dtype=torch.bool)
    allowed = torch.ones_like(force)
    force[0, 4], allowed[:, 1], allowed[5] = True, False, False
    gated = Gate(LinearScorer(3, NUM_EXPERTS), TopK(2))(x, force=force, allowed=allowed)
    assert gated.mask[0, 4] and not gated.mask[:, 1].any() and not gated.mask[5].any()
    assert (gated.probs[~allowed] == 0).all() and (gated.mask.sum(1)[:5] == 2).all()


def test_capacity_is_a_factor_of_the_mean_load() -> None:
    logits = torch.tensor([[3.0, 0, 0]] * 5 + [[0, 3.0, 0]])
    gated = Gate(lambda x: x, TopK(1), capacity_factor=1.5, priority="score")(logits)
    assert gated.mask.sum(0).tolist() == [5, 1, 0]
    assert gated.routing.counts.tolist() == [3, 1, 0] and gated.routing.dropped.tolist() == [2, 0, 0]


def test_thresholds_with_hysteresis_and_budgets() -> None:
    scores = torch.tensor([[0.9, 0.5], [0.55, 0.1]])
    gate = Gate(lambda x: x, Threshold(0.6, gap=0.1), normalization="identity")
    before = torch.tensor([[False, True], [True, True]])
    assert gate(scores).mask.tolist() == [[True, False], [False, False]]
    assert gate(scores, previous=before).mask.tolist() == [[True, True], [True, False]]
    chosen = Gate(lambda x: x, ExpertChoice(0.5), normalization="identity")(scores)
    assert chosen.mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("normalization", ["identity", "softmax", "sigmoid", "sinkhorn"])
@pytest.mark.parametrize("selection", [TopK(2), Threshold(0.3), ExpertChoice(0.5)])
@pytest.mark.parametrize("num_tokens, num_experts", [(0, 3), (4, 1), (1, 1), (4, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_edges_are_finite(
    normalization: str, selection: Any, num_tokens: int, num_experts: int, masked: bool
) -> None:
    gate = Gate(
        LinearScorer(2, num_experts),
        selection,
        normalization=normalization,  # type: ignore[arg-type]
        noise=Noise(),
        balancer=BiasBalancer(num_experts),
        capacity_factor=1.0,
        priority="score",
        renormalize=True,
    )
    allowed = torch.full((num_tokens, num_experts), not masked)
    gated = gate(torch.randn(num_tokens, 2), allowed=allowed)
    gate.observe(gated)
    gate.advance()
    gated.routing.weight.sum().backward()
    assert not masked or not gated.mask.any()
    assert gated.routing.weight.isfinite().all() and gate.balancer is not None
    assert gate.balancer.bias.isfinite().all()
    assert gate.scorer.weight.grad is not None and gate.scorer.weight.grad.isfinite().all()


def test_a_random_scorer_follows_the_step_of_its_gate() -> None:
    gate = Gate(RandomScorer(3, 6), TopK(2), normalization="identity")
    x = torch.zeros(4, 1)
    assert torch.equal(gate(x).scores, random_scores(3, 0, torch.arange(4), (0, 6)))
    gate.advance()
    assert torch.equal(gate(x).scores, random_scores(3, 1, torch.arange(4), (0, 6)))


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "sinkhorn"])
def test_the_router_learns_at_k_1(normalization: str) -> None:
    scorer = LinearScorer(3, 4)
    gated = Gate(scorer, TopK(1), normalization=normalization)(torch.randn(8, 3))  # type: ignore[arg-type]
    (gated.routing.weight * torch.randn(8)).sum().backward()
    assert scorer.weight.grad is not None and scorer.weight.grad.abs().sum() > 0


def test_straight_through_weighs_one_and_still_learns() -> None:
    scorer = LinearScorer(3, 4)
    gated = Gate(scorer, TopK(1), straight=True)(torch.randn(8, 3))
    assert (gated.routing.weight == 1).all()
    (gated.routing.weight * torch.randn(8)).sum().backward()
    assert scorer.weight.grad is not None and scorer.weight.grad.abs().sum() > 0


@given(st.integers(0, 5), st.integers(1, 4))
def test_straight_through_is_the_mask_with_the_gradient_of_probs(t: int, e: int) -> None:
    probs = torch.rand(t, e, requires_grad=True)
    mask = top_k(probs, 1)
    out = straight_through(mask, probs)
    upstream = torch.randn(t, e)
    out.backward(upstream)
    assert torch.equal(out, mask.float())
    assert probs.grad is not None and torch.equal(probs.grad, upstream)


def test_capacity_is_not_rounded_up_from_a_rounding_error() -> None:
    """1.1 * 100 / 10 is 11.000000000000002 in floating point, and 11 to anyone who asks for it."""
    logits = torch.zeros(100, 10)
    gated = Gate(lambda x: x, TopK(1), capacity_factor=1.1)(logits)
    assert gated.routing.counts.max() == 11


def test_bad_input_is_refused_with_its_values() -> None:
    scorer = LinearScorer(3, 4)
    with pytest.raises(ValueError, match="renormalize at k = 1"):
        Gate(scorer, renormalize=True)
    with pytest.raises(ValueError, match="renormalize at k = 1"):  # also where it ends up there
        Gate(scorer, TopK(Anneal(4, 0.6, 100)), renormalize=True)
    with pytest.raises(ValueError, match="choose one"):
        Gate(scorer, TopK(2), renormalize=True, straight=True)
    with pytest.raises(ValueError, match="positive, got 0"):
        Gate(scorer, capacity_factor=0)
    with pytest.raises(ValueError, match=r"\[1, 2\] and \[2, 1\]"):
        straight_through(torch.ones(1, 2, dtype=torch.bool), torch.ones(2, 1))
