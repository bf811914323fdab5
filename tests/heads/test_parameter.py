"""Centres that are an ordinary parameter: whoever moves them, by whatever way, the head learns from it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads import SGD, Margin, ShardedMarginHead, add_identities, clustered, hashed, sampled

C, D = 90, 6


def make(active: Any = None, **settings: Any) -> ShardedMarginHead:
    defaults = {"storage": "float64", "optimizer": None, "scale": 16.0, "tile": 32, "init_std": 1.0}
    return ShardedMarginHead(C, D, Margin(1.0, 0.2, 0.0), active=active, **(defaults | settings))


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, D, dtype=torch.float64, generator=generator).to(dtype)
    return x.requires_grad_(), torch.randint(0, C, (7,), generator=generator)


def expected_loss(reference: Callable[..., Tensor], head: ShardedMarginHead, x: Tensor, y: Tensor) -> Tensor:
    return reference(x.double(), y, head.weight.detach().double(), (1.0, 0.2, 0.0), 16.0)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float32),
    "to cpu": lambda m: m.to("cpu", torch.float64),
    "copy": deepcopy,
    "type": lambda m: m.type(torch.float64),
    "data": lambda m: setattr(m.weight, "data", m.weight.data.clone().double()) or m,
    "assigned": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().clone())) or m,
}


@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_head_goes_on_learning_whatever_it_was_turned_into(
    reference: Callable[..., Tensor], cast: str, storage: str
) -> None:
    head = make(storage=storage)
    head = CASTS[cast](head)
    plain = torch.optim.SGD(head.parameters(), 0.5)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[head.weight.dtype]
    losses = []
    for _ in range(3):
        x, y = batch()
        loss = head(x, y)
        torch.testing.assert_close(
            loss.double(), expected_loss(reference, head, x.detach(), y), rtol=tolerance, atol=tolerance
        )
        loss.backward()
        plain.step()
        plain.zero_grad()
        losses.append(loss.item())
        assert head.full_centers().dtype == head.weight.dtype
        assert torch.equal(head.full_centers(), head.weight)
    assert losses[0] > losses[1] > losses[2]


def test_a_head_in_half_precision_is_refused() -> None:
    head = make().half()
    with pytest.raises(ValueError, match=r"head\.weight must be float64, float32 or bfloat16, got float16"):
        head(*batch())


def test_a_parameter_of_another_shape_is_refused() -> None:
    head = make()
    head.weight = nn.Parameter(torch.zeros(C, D + 1))
    with pytest.raises(ValueError, match=r"head.weight must be \[90, 6\], got \[90, 7\]"):
        head(*batch())


def rotated(w: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator)).Q
    return (w.double() @ turn).to(w.dtype)


@torch.no_grad()
def _in_place(head: ShardedMarginHead) -> None:
    head.weight.copy_(rotated(head.weight))


def _step(head: ShardedMarginHead) -> None:
    head.weight.grad = head.weight.detach() - rotated(head.weight.detach())
    torch.optim.SGD([head.weight], 1.0).step()


MOVES: dict[str, Callable[[ShardedMarginHead], Any]] = {
    "optimiser": _step,
    "in place": _in_place,
    "through data": lambda head: head.weight.data.copy_(rotated(head.weight.data)),
    "state dict": lambda head: head.load_state_dict(
        head.state_dict() | {"weight": rotated(head.weight.detach())}
    ),
    "assigned": lambda head: setattr(head, "weight", nn.Parameter(rotated(head.weight.detach()))),
    "set_centers": lambda head: head.set_centers(rotated(head.weight.detach())),
    "sign": lambda head: head.weight.data.neg_(),  # no length changes
}


@pytest.mark.parametrize("move", MOVES)
def test_cluster_gates_hear_of_every_way_that_centres_move(move: str) -> None:
    """The certificate is above the measured share, and radii are those of the centres as they are."""
    head = make(clustered(20, 1, refresh=0))
    x, y = batch()
    head(x, y)
    MOVES[move](head)
    measured = head.dropped_share(x.detach(), y)
    head(x, y)
    gate, w = head.gate, F.normalize(head.full_centers())
    assert (gate.certificate.bound >= measured - 1e-12).all()
    angle = torch.arccos((w * gate.centroids[gate.assignment.long()]).sum(1).clamp(-1, 1))
    assert (gate.radius[gate.assignment.long()] >= angle).all()


@pytest.mark.parametrize("move", MOVES)
def test_hash_gates_hear_of_every_way_that_centres_move(move: str) -> None:
    head = make(hashed(3, 6))
    head(*batch())
    MOVES[move](head)
    head(*batch())
    scorer = head.gate.scorer
    assert torch.equal(scorer.expert_codes, scorer.codes(head.full_centers().float()))


@pytest.mark.parametrize("active", [clustered(20, 1, refresh=0), hashed(3, 6)])
def test_gates_of_fused_heads_hear_of_centres_that_are_written_into(active: Any) -> None:
    head = make(active, optimizer=SGD(0.1))
    head.shard.store.whole("weight").copy_(rotated(head.full_centers()))
    head.refresh_norms()
    fresh = make(active, optimizer=SGD(0.1))
    fresh.set_centers(head.full_centers())
    if isinstance(head.gate, type(make(clustered(3)).gate)):
        w = F.normalize(head.full_centers())
        angle = torch.arccos((w * head.gate.centroids[head.gate.assignment.long()]).sum(1))
        assert (head.gate.radius[head.gate.assignment.long()] >= angle).all()
    else:
        assert torch.equal(head.gate.scorer.expert_codes, fresh.gate.scorer.expert_codes)


@pytest.mark.parametrize("move", ["optimiser", "in place", "through data"])
def test_every_step_has_a_sample_of_its_own_and_its_parts_share_one(move: str) -> None:
    head = make(sampled(0.2))
    drawn = []
    for _ in range(3):
        for _ in range(2):  # parts of a batch, between which nothing moves
            x, y = batch()
            head(x, y).backward()
            drawn.append(head.weight.grad.ne(0).any(1))
            head.weight.grad = None
        MOVES[move](head)
        head.weight.grad = None
        head.dropped_share(x.detach(), y)  # measuring doesn't take the step's place
    assert all(torch.equal(drawn[i], drawn[i + 1]) for i in (0, 2, 4))
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[2], drawn[4])
    assert head.step == 2
    head(x, y)
    assert head.step == 3


def test_clusters_are_made_anew_in_time() -> None:
    head = make(clustered(9, 1, refresh=2))
    seen = []
    for _ in range(4):
        x, y = batch()
        head(x, y).backward()
        _in_place(head)
        seen.append(head.gate.centroids.clone())
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("move", ["optimiser", "in place", "assigned", "state dict", "set_centers"])
def test_a_loss_from_before_the_parameter_moved_is_refused(move: str) -> None:
    head = make()
    loss = head(*batch())
    MOVES[move](head)
    with pytest.raises(RuntimeError, match="the centres have moved since this loss was computed"):
        loss.backward()


@pytest.mark.parametrize("move", ["state dict", "set_centers"])
def test_a_loss_from_before_fused_centres_were_replaced_is_refused(move: str) -> None:
    head = make(optimizer=SGD(0.1))
    moves: dict[str, Callable[[], Any]] = {
        "state dict": lambda: head.load_state_dict(head.state_dict()),
        "set_centers": lambda: head.set_centers(rotated(head.full_centers())),
    }
    loss = head(*batch())
    moves[move]()
    with pytest.raises(RuntimeError, match="the centres have moved since this loss was computed"):
        loss.backward()


def test_gradients_of_two_losses_add_up(reference: Callable[..., Tensor]) -> None:
    head = make()
    w = head.full_centers().requires_grad_()
    losses = [head(*batch(seed)) for seed in range(2)]
    for seed, loss in enumerate(losses):
        loss.backward()
        x, y = batch(seed)
        reference(x, y, w, (1.0, 0.2, 0.0), 16.0).backward()
    torch.testing.assert_close(head.weight.grad, w.grad, rtol=1e-9, atol=1e-12)


def test_more_identities_of_a_cast_head_are_of_its_kind() -> None:
    head = make(storage="float32").double()
    more = add_identities(head, 3)
    assert more.weight.dtype == torch.float64
    assert torch.equal(more.full_centers()[:C], head.full_centers())
