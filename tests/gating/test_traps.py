"""Mistakes that mixtures of experts are known for, each shown and then shown to be out of the way.

Ranks that hang when an expert got no tokens are in ranks_exchange.py (check_skipping_experts, banned ones).
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigvision.gating import (
    BiasBalancer,
    Experts,
    Gate,
    LinearScorer,
    Noise,
    TopK,
    apply_experts,
    combine,
    dispatch,
    expert_choice,
    normalize,
    route,
    top_k,
)


def router_gradient(renormalize: bool, k: int) -> float:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs = normalize(logits)
    routing = route(top_k(probs, k), probs, renormalize=renormalize)
    combine(
        dispatch(torch.arange(6.0)[:, None] + 1, routing) * routing.expert[:, None], routing
    ).sum().backward()
    assert logits.grad is not None
    return float(logits.grad.abs().max())


def test_k_1_with_renormalisation_has_no_router_gradient() -> None:
    assert router_gradient(renormalize=True, k=1) < 1e-6
    assert router_gradient(renormalize=False, k=1) > 0.01
    assert router_gradient(renormalize=True, k=2) > 0.01
    with pytest.raises(ValueError, match="router would get no gradient"):
        Gate(LinearScorer(3, 4), TopK(1), renormalize=True)


def test_16_bit_counters_stop_counting() -> None:
    narrow = torch.zeros(2, dtype=torch.bfloat16)
    balancer = BiasBalancer(2).bfloat16()
    for _ in range(1000):
        narrow += torch.tensor([1, 0])
        balancer.observe(torch.tensor([1, 0]))
    assert narrow.tolist() == [256, 0]
    assert balancer.counts.tolist() == [1000, 0]


def test_capacity_above_the_number_of_tokens() -> None:
    scores = torch.rand(3, 2)
    with pytest.raises(RuntimeError):
        scores.topk(10, dim=0)  # what expert choice would do if it did not look
    assert expert_choice(scores, 10).all()
    assert top_k(scores, 10).all()
    routing = route(torch.ones(3, 2, dtype=torch.bool), scores, capacity=10, priority="score")
    assert routing.counts.tolist() == [3, 3] and routing.dropped.tolist() == [0, 0]
    assert route(torch.ones(0, 2, dtype=torch.bool), scores[:0], capacity=10).counts.tolist() == [0, 0]


def test_scatter_add_in_a_fixed_order() -> None:
    """1e8 + 1 - 1e8 is 0 or 1 by the order of its terms: the order is that of the experts, every time."""
    routing = route(torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3))
    assert float(combine(torch.tensor([[1e8], [1.0], [-1e8]]), routing)) == 0
    assert float(combine(torch.tensor([[1e8], [-1e8], [1.0]]), routing)) == 1
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(500, 8, generator=generator) < 0.5
    y = torch.randn(int(mask.sum()), 16, generator=generator)
    big = route(mask, torch.rand(500, 8, generator=generator))
    first = combine(y, big)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            assert torch.equal(combine(y, big), first)
    finally:
        torch.set_num_threads(threads)


class Drifting(nn.Module):
    """A scorer that answers otherwise each time, as one with its own noise or changing numerics does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.roll(self.calls, 1)


def test_routing_again_inside_activation_checkpointing() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    experts = Experts([nn.Linear(4, 4) for _ in range(4)])

    def gradients(run: object) -> list[Tensor]:
        experts.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()  # type: ignore[operator]
        assert leaf.grad is not None
        return [leaf.grad, *(p.grad.clone() for p in experts.parameters() if p.grad is not None)]

    def inside(leaf: Tensor) -> Tensor:
        gate = Gate(Drifting(), TopK(1))
        return checkpoint(lambda z: experts(z, gate(z).routing), leaf, use_reentrant=False)  # type: ignore[no-any-return]

    def outside(leaf: Tensor) -> Tensor:
        scorer = Drifting()
        routing = Gate(scorer, TopK(1))(leaf).routing
        out = checkpoint(experts, leaf, routing, use_reentrant=False)
        assert scorer.calls == 1
        return out  # type: ignore[no-any-return]

    plain = gradients(lambda leaf: experts(leaf, Gate(Drifting(), TopK(1))(leaf).routing))
    for have, want in zip(gradients(outside), plain, strict=True):
        torch.testing.assert_close(have, want)
    # Routed again, the rows of the experts differ from those of the forward pass: torch notices the shapes,
    # or the gradients are those of another selection.
    try:
        wrong = gradients(inside)
    except torch.utils.checkpoint.CheckpointError:
        return
    assert any(not torch.allclose(a, b) for a, b in zip(wrong, plain, strict=True))


def test_this_gate_may_even_be_computed_again() -> None:
    """Its noise is counter-based and its state moves outside of forward, so recomputation routes alike."""
    x = torch.randn(9, 3)
    gate = Gate(LinearScorer(3, 4), TopK(2), noise=Noise("gumbel"), balancer=BiasBalancer(4))
    experts = [nn.Linear(3, 3) for _ in range(4)]

    def gradients(again: bool) -> list[Tensor]:
        gate.zero_grad()
        leaf = x.clone().requires_grad_()

        def run(z: Tensor) -> Tensor:
            return apply_experts(z, gate(z).routing, experts)

        out = checkpoint(run, leaf, use_reentrant=False) if again else run(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None and gate.scorer.weight.grad is not None
        return [leaf.grad, gate.scorer.weight.grad.clone()]

    for have, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(have, want)
    assert gate.balancer is not None and (gate.balancer.counts == 0).all()
