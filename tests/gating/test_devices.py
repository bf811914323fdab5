"""The same numbers and the same masks on an accelerator."""

import pytest
import torch

from bigvision.gating import (
    HashScorer,
    apply_experts,
    combine,
    counter_key,
    counter_uniform,
    dispatch,
    expert_choice,
    normalize,
    random_scores,
    route,
    threshold,
    top_k,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device at hand")


def test_random_scores_are_identical() -> None:
    ids = torch.arange(3) * 5
    here, there = (random_scores(1, 2, ids.to(device), (7, 1_000_007)) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    assert torch.equal(threshold(here, 0.9), threshold(there, 0.9).cpu())


def test_selections_and_hashes_are_identical() -> None:
    scores = counter_uniform(counter_key(0), torch.arange(200), 0, 30).mul(8).round()  # many ties
    allowed = counter_uniform(counter_key(1), torch.arange(200), 0, 30) < 0.7
    for select in (lambda s, a: top_k(s, 5, allowed=a), lambda s, a: expert_choice(s, 11, allowed=a)):
        assert torch.equal(select(scores, allowed), select(scores.cuda(), allowed.cuda()).cpu())
    x = counter_uniform(counter_key(2), torch.arange(50), 0, 8) - 0.5
    scorer = HashScorer(8, 4, 6)
    assert (scorer.codes(x) == scorer.cuda().codes(x.cuda()).cpu()).double().mean() > 0.999


def test_rows_are_summed_in_one_order_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2000, 16, generator=generator) < 0.5
    probs = normalize(torch.randn(2000, 16, generator=generator))
    routing, there = route(mask, probs), route(mask.cuda(), probs.cuda())
    assert torch.equal(routing.token, there.token.cpu()) and torch.equal(routing.counts, there.counts.cpu())
    y = torch.randn(len(routing.token), 64, generator=generator)
    first = combine(y.cuda(), there)
    assert all(torch.equal(combine(y.cuda(), there), first) for _ in range(5))
    torch.testing.assert_close(first.cpu(), combine(y, routing))
    leaf = torch.randn(2000, 64, device="cuda", requires_grad=True)
    grads = [torch.autograd.grad(dispatch(leaf, there), leaf, y.cuda())[0] for _ in range(5)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_hard_experts_give_the_numbers_of_the_cpu() -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(40, 6), torch.randn(40, 3)
    experts = [torch.nn.Linear(6, 5) for _ in range(3)]
    want = apply_experts(x, route(top_k(logits, 2), normalize(logits)), experts)
    experts = [expert.cuda() for expert in experts]
    have = apply_experts(x.cuda(), route(top_k(logits.cuda(), 2), normalize(logits.cuda())), experts)
    torch.testing.assert_close(have.cpu(), want, rtol=1e-3, atol=1e-4)
