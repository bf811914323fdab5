"""The classes that take part come from `bigvision.gating`, and what each gate promises of them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision import gating
from heads import SGD, Margin, ShardedMarginHead, clustered, hashed, sampled
from heads.gates import GateInput

C, D = 300, 8


def make(active: object, **settings: object) -> ShardedMarginHead:
    defaults = {"margin": Margin(1.0, 0.3, 0.0), "scale": 16.0, "storage": "float64", "optimizer": SGD(0.1)}
    return ShardedMarginHead(C, D, active=active, tile=64, **(defaults | settings))


def batch(seed: int = 0, b: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(0, C, (b,), generator=generator)


def active_rows(head: ShardedMarginHead, x: Tensor, y: Tensor, step: int = 0) -> Tensor:
    given = GateInput(F.normalize(x.detach()), y, head.shard.own_rows(y), step)
    return head.gate.select(given).rows


@pytest.mark.parametrize(
    ("active", "selection"),
    [(sampled(0.2), "threshold"), (hashed(3, 5), "threshold"), (clustered(12, 2), "top_k")],
)
def test_another_selection_is_another_training(
    active: object, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, replaced = make(active), make(active)
    x, y = batch()
    usual(x, y).backward()

    def forced_only(scores: Tensor, _: object, *, force: Tensor, **__: object) -> Tensor:
        return force.clone()

    monkeypatch.setattr(gating, selection, forced_only)
    replaced(x, y).backward()
    moved = (replaced.full_centers() != make(active).full_centers()).any(1)
    if selection == "threshold":
        assert moved.nonzero()[:, 0].tolist() == y.unique().tolist()
    assert moved.sum() < (usual.full_centers() != make(active).full_centers()).any(1).sum()


@pytest.mark.parametrize("active", [sampled(0.2), sampled(0.2, run=16), hashed(3, 5), clustered(24, 1)])
def test_left_out_classes_and_their_momentum_stay_bit_identical(active: object) -> None:
    head = make(active, optimizer=SGD(0.1, momentum=0.9, weight_decay=1e-2), storage="bfloat16")
    for step in range(3):
        x, y = batch(step)
        before = {n: head.shard.store.whole(n).clone() for n in head.shard.store.names}
        rows = active_rows(head, x, y, step)
        head(x, y).backward()
        idle = torch.ones(C, dtype=torch.bool)
        idle[rows] = False
        assert 0 < idle.sum() < C
        for name, old in before.items():
            assert torch.equal(head.shard.store.whole(name)[idle], old[idle])
            assert not torch.equal(head.shard.store.whole(name)[~idle], old[~idle])


@pytest.mark.parametrize("run", [1, 8])
def test_each_class_is_drawn_with_the_rate_and_own_classes_always(run: int) -> None:
    head = make(sampled(0.25, run=run))
    x, y = batch()
    counts = torch.zeros(C)
    for step in range(400):
        rows = active_rows(head, x, y, step)
        assert torch.isin(y, rows).all()
        counts[rows] += 1
    others = torch.ones(C, dtype=torch.bool)
    others[y] = False
    assert abs(counts[others].mean() / 400 - 0.25) < 0.01 * run
    assert (counts[others] / 400 - 0.25).abs().max() < 0.12


def test_the_unbiased_denominator_has_the_full_one_as_its_mean() -> None:
    head, (x, y) = make(sampled(0.3, unbiased=True)), batch()
    u, w = F.normalize(x.detach()), F.normalize(head.full_centers())
    others = torch.exp(16.0 * u @ w.t())
    others[torch.arange(len(y)), y] = 0.0
    sums = []
    for step in range(600):
        active = head.gate.select(GateInput(u, y, head.shard.own_rows(y), step))
        sums.append((others[:, active.rows] * torch.exp(active.log_weight)).sum(1))
    found = torch.stack(sums)
    error = found.std(0) / len(sums) ** 0.5
    assert ((found.mean(0) - others.sum(1)).abs() < 4.5 * error).all()
    # Its logarithm is biased low (Jensen).
    assert (found.log().mean(0) < others.sum(1).log()).all()


def test_weights_of_the_sampled_loss_are_those_of_the_oracle(reference: Callable[..., Tensor]) -> None:
    head, (x, y) = make(sampled(0.3, unbiased=True)), batch()
    active = head.gate.select(GateInput(F.normalize(x.detach()), y, head.shard.own_rows(y), 0))
    log_weight = torch.full((C,), -torch.inf, dtype=torch.float64)
    log_weight[active.rows] = active.log_weight
    w = head.full_centers().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    loss, expected = head(x, y), reference(x2, y, w, (1.0, 0.3, 0.0), 16.0, log_weight=log_weight)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.full_centers(), w.detach() - 0.1 * w.grad, rtol=1e-10, atol=1e-12)


def test_hashing_meets_the_nearest_classes_more_often_than_others() -> None:
    head = make(hashed(6, 5), init_std=1.0)
    w = F.normalize(head.full_centers())
    x = (w[:5] + 0.05 * torch.randn(5, D, dtype=torch.float64)).requires_grad_()
    rows = active_rows(head, x, torch.full((5,), 299))
    assert torch.isin(torch.arange(5), rows).all() and len(rows) < 0.9 * C


def test_hash_codes_follow_the_centres() -> None:
    head = make(hashed(2, 6), optimizer=SGD(5.0))
    x, y = batch()
    head(x, y).backward()
    scorer = head.gate.scorer
    assert torch.equal(scorer.expert_codes, scorer.codes(head.full_centers().float()))


@pytest.mark.parametrize(
    "make_gate",
    [
        lambda: sampled(0.0),
        lambda: sampled(1.5),
        lambda: sampled(0.5, run=0),
        lambda: clustered(4, 5),
        lambda: clustered(4, 1, epsilon=1.0),
        lambda: hashed(2, 5, collisions=3),
        lambda: make(clustered(C + 1)),
        lambda: make(clustered(4), optimizer=SGD(0.1, momentum=0.9, inactive="dense")),
        lambda: make(hashed(2, 30)),
    ],
)
def test_impossible_gates_are_refused(make_gate: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\d|frozen"):
        make_gate()


def test_a_gate_that_leaves_out_a_class_of_the_batch_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make(sampled(0.5))
    x, y = batch()
    monkeypatch.setattr(gating, "threshold", lambda scores, *_, **__: torch.zeros_like(scores, dtype=bool))
    with pytest.raises(RuntimeError, match=rf"left out row {int(y[0])}, the class of a sample"):
        head(x, y)
    lacking = torch.ones(1, C, dtype=torch.bool)
    lacking[0, y[-1]] = False
    monkeypatch.setattr(gating, "threshold", lambda *_, **__: lacking)
    with pytest.raises(RuntimeError, match=rf"left out row {int(y[-1])},"):
        head(x, y)
