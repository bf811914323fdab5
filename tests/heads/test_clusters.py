"""The certificate of cluster gates: above the measured share, and below epsilon where that is asked for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads import SGD, Margin, ShardedMarginHead, clustered


def trained(classes: int, groups: int, active: object, dim: int = 32, scale: float = 64.0) -> tuple:
    """A head whose centres gather in tight groups, and features near them."""
    generator = torch.Generator().manual_seed(0)
    centre = F.normalize(torch.randn(groups, dim, dtype=torch.float64, generator=generator))
    spread = 0.3 * F.normalize(torch.randn(classes, dim, dtype=torch.float64, generator=generator))
    w = centre[torch.arange(classes) % groups] + spread
    head = ShardedMarginHead(
        classes,
        dim,
        Margin(1.0, 0.2, 0.0),
        scale,
        active=active,
        storage="float64",
        optimizer=SGD(0.05),
        tile=128,
    )
    head.set_centers(w)
    y = torch.randint(0, classes, (8,), generator=generator)
    x = F.normalize(w)[y] + 0.1 * F.normalize(torch.randn(8, dim, dtype=torch.float64, generator=generator))
    return head, x.requires_grad_(), y


def largest_angles(head: ShardedMarginHead) -> Tensor:
    gate, w = head.gate, F.normalize(head.full_centers())
    angle = torch.arccos((w * gate.centroids[gate.assignment.long()]).sum(1).clamp(-1, 1))
    out = torch.zeros(gate.spec.clusters, dtype=torch.float64)
    return out.scatter_reduce(0, gate.assignment.long(), angle, "amax")


@settings(max_examples=15, deadline=None)
@given(clusters=st.integers(1, 30), top=st.integers(1, 3), scale=st.floats(4, 64), steps=st.integers(0, 3))
def test_the_bound_holds_while_centres_move(clusters: int, top: int, scale: float, steps: int) -> None:
    head, x, y = trained(90, 12, clustered(clusters, min(top, clusters), refresh=0), dim=6, scale=scale)
    for step in range(steps):
        head(x, y.roll(step)).backward()
        assert (head.gate.radius >= largest_angles(head)).all()
    measured = head.dropped_share(x.detach(), y)
    head(x, y)
    assert (head.gate.certificate.bound >= measured - 1e-12).all()


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 1e-3])
def test_clusters_open_until_the_bound_is_below_epsilon(epsilon: float) -> None:
    head, x, y = trained(400, 20, clustered(40, 1, epsilon=epsilon))
    head(x, y)
    certificate = head.gate.certificate
    assert certificate.bound.max() < epsilon
    assert (head.dropped_share(x.detach(), y) <= certificate.bound + 1e-12).all()


def test_trained_clusters_certify_a_tenth_with_a_fifth_of_the_classes() -> None:
    head, x, y = trained(4000, 200, clustered(200, 1, epsilon=0.1), dim=128)
    head(x, y)
    assert head.gate.certificate.bound.max() < 0.1
    assert head.gate.certificate.opened < 0.2


def test_on_evenly_spread_centres_the_bound_is_true_and_says_nothing() -> None:
    head = ShardedMarginHead(
        500, 16, Margin(), 64.0, active=clustered(20, 1), storage="float64", optimizer=SGD(0.1)
    )
    x, y = torch.randn(4, 16, dtype=torch.float64), torch.arange(4)
    measured = head.dropped_share(x, y)
    head(x, y)
    assert (head.gate.certificate.bound >= measured).all() and head.gate.certificate.bound.min() > 0.9


def test_clusters_are_made_anew_after_refresh_steps() -> None:
    head, x, y = trained(90, 12, clustered(10, 1, refresh=2))
    seen = []
    for _ in range(5):
        head(x, y).backward()
        seen.append(head.gate.centroids.clone())
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4, 1e-2])
@pytest.mark.parametrize("dim", [3, 300])
def test_radii_reach_every_class_of_tight_clusters(storage: str, spread: float, dim: int) -> None:
    """Near 1 a cosine's last digit is an angle of half its digits: rounding may not make a radius short."""
    generator = torch.Generator().manual_seed(dim)
    head = ShardedMarginHead(
        40, dim, active=clustered(1, 1, refresh=0), storage=storage, optimizer=SGD(0.1), tile=16
    )
    lengths = torch.rand(40, 1, dtype=torch.float64, generator=generator) + 0.1
    w = F.normalize(torch.randn(1, dim, dtype=torch.float64, generator=generator))
    w = w + spread * F.normalize(torch.randn(40, dim, dtype=torch.float64, generator=generator))
    head.set_centers(w * lengths)
    stored, centroid = (F.normalize(t.double()) for t in (head.full_centers(), head.gate.centroids))
    angle = 2 * torch.arcsin(((stored - centroid).norm(dim=1) / 2).clamp(max=1.0))
    assert float(head.gate.radius) >= float(angle.max())
    assert float(head.gate.radius) < float(angle.max()) + (1e-6 if storage == "float64" else 1e-2)


@pytest.mark.parametrize(("storage", "native"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_of_the_softmax_as_it_is_computed(
    storage: str, native: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features lie on the classes that are left out, so that the bound is all but reached."""
    monkeypatch.setattr("heads.shard.has_fast_bfloat16", lambda device: native)
    generator = torch.Generator().manual_seed(seed)
    head = ShardedMarginHead(
        64, 40, Margin(), 8.0, active=clustered(2, 1, refresh=0), storage=storage, optimizer=SGD(0.1)
    )
    poles = torch.randn(2, 40, generator=generator)
    head.set_centers(poles.repeat_interleave(32, 0) * (0.1 + torch.rand(64, 1, generator=generator)))
    assert sorted(head.gate.counts.tolist()) == [32, 32]
    x, y = poles[1] + 1e-3 * torch.randn(16, 40, generator=generator), torch.arange(16)
    measured = head.dropped_share(x, y)
    head(x, y)
    assert (head.gate.certificate.bound >= measured).all()
    assert (head.gate.certificate.bound - measured).max() < 1e-3
