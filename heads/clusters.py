"""Clusters of classes as the gate's experts, and a certificate for what the closed ones would have added.

A sample opens the clusters whose centroids are nearest to it. Of a closed cluster e with n_e classes, all
within the angle radius_e of its centroid, no class is nearer to a feature u than max(0, angle(u,
centroid_e) - radius_e), so

    dropped mass of u <= sum over closed e of n_e * exp(s * cos(max(0, angle(u, centroid_e) - radius_e))).

Angles are taken wide and logits high by what rounding can amount to. Over the whole denominator that is a
bound on the share of the softmax that was left out. It says nothing while centres are spread evenly (then
radii are near a right angle), and much once they are trained and gather in clusters.

Legend: B gathered samples, V valid ones (label not -1), E clusters, D dimension, n classes of this shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from bigvision import gating
from bigvision.ranks import Ranks
from heads.gates import ActiveGate, GateInput
from heads.shard import ActiveRows, Shard
from heads.stores import Rows

_NONE = 3.0  # the smallest cosine of a cluster without rows here


@dataclass(frozen=True)
class Clustered:
    """Clusters by centroid cosine; see `clustered`."""

    clusters: int
    top: int = 1
    epsilon: float | None = None
    refresh: int = 1000
    iterations: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.clusters:
            raise ValueError(f"each sample opens 1 to {self.clusters} clusters, got {self.top}")
        if self.epsilon is not None and not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")
        if self.refresh < 0 or self.iterations < 0:
            raise ValueError(
                f"refresh and iterations must not be negative, got {self.refresh}, {self.iterations}"
            )

    def build(self, shard: Shard, ranks: Ranks, seed: int) -> ActiveGate:
        """See `GateSpec.build`."""
        if self.clusters > shard.classes.num_classes:
            raise ValueError(f"{shard.classes.num_classes} classes can't make {self.clusters} clusters")
        if not shard.normalized or shard.history is not None:
            raise ValueError("clusters need cosine logits and idle rows that stay where they are (frozen)")
        return ClusterGate(self, shard, ranks, seed)


def clustered(
    clusters: int, top: int = 1, *, epsilon: float | None = None, refresh: int = 1000, iterations: int = 5
) -> Clustered:
    """Each sample opens the `top` clusters nearest to it and its own; the union over the batch takes part.

    Args:
        clusters: E, made by spherical k-means of the centres of all ranks.
        top: clusters a sample opens, its own among them.
        epsilon: open further clusters until the certified dropped share of every sample is below this.
        refresh: steps after which the clusters are made anew from the moved centres; 0 for never.
        iterations: of k-means, each a pass over all centres.

    Raises:
        ValueError: a count outside its range, or more clusters than classes.
    """
    return Clustered(clusters, top, epsilon, refresh, iterations)


@dataclass(frozen=True)
class Certificate:
    """Upper bound on the dropped share of each valid sample's softmax, float64 [V]; the share of classes
    opened.
    """

    bound: Tensor
    opened: float


class ClusterGate:
    """The clusters of one head, as this rank sees them. Centroids and counts are the same on every rank."""

    def __init__(self, spec: Clustered, shard: Shard, ranks: Ranks, seed: int) -> None:
        self.spec, self.shard, self.ranks = spec, shard, ranks
        device, acc, dim = shard.device, shard.acc, shard.store.whole("weight").shape[1]
        self.assignment = torch.zeros(len(shard.classes), dtype=torch.int32, device=device)
        self.centroids = torch.zeros(spec.clusters, dim, dtype=acc, device=device)
        self._fitted = torch.zeros(1, dtype=torch.int64, device=device)
        self.certificate: Certificate | None = None
        self._bounds = torch.empty(0)
        self._nearest = torch.full((spec.clusters,), _NONE, dtype=acc, device=device)
        self._fresh = self._nearest.clone()
        self._open = torch.zeros(spec.clusters, dtype=torch.bool, device=device)
        self._seed = seed
        self.rebuild()

    def renew(self, step: int) -> None:
        """Clusters from the moved centres, every `refresh` steps."""
        if self.spec.refresh and step - int(self._fitted) >= self.spec.refresh:
            self._fit()
            self._fitted.fill_(step)

    def select(self, given: GateInput) -> ActiveRows:
        """The top clusters of each sample and its own, all their classes."""
        valid = given.labels >= 0
        own = self._own_clusters(given)[valid]
        scores = gating.cosine_scores(given.unit[valid], self.centroids)
        force = torch.zeros_like(scores, dtype=torch.bool)
        force[torch.arange(len(own), device=own.device), own] = True
        self._open = gating.top_k(scores, self.spec.top, force=force).any(0)
        self._bounds = self._log_bounds(scores)
        return self._rows(self._open)

    def widen(self, given: GateInput, active: ActiveRows, lse: Tensor) -> ActiveRows | None:
        """The clusters that must be opened for the bound to fall below epsilon, given the sums so far."""
        if self.spec.epsilon is None:
            return None
        # Dropping D of a whole of D + A is at most epsilon where D <= A * epsilon / (1 - epsilon).
        epsilon = self.spec.epsilon * (1.0 - 1e-6)
        budget = lse[given.labels >= 0, None] + log(epsilon / (1.0 - epsilon))
        closed = self._bounds.masked_fill(self._open, -torch.inf)
        ordered = closed.sort(dim=1).values
        beyond = torch.logcumsumexp(ordered, 1) > budget
        # The smallest bounds are dropped while their sum fits; the first that doesn't is the threshold.
        tau = ordered.masked_fill(~beyond, torch.inf).amin(1, keepdim=True)
        more = gating.threshold(closed, tau, allowed=(~self._open).expand_as(closed)).any(0)
        self._open = self._open | more
        return self._rows(more) if more.any() else None

    def certify(self, given: GateInput, lse: Tensor) -> None:
        """Puts the bound on record, with the final log-denominators float64 [B]."""
        dropped = torch.logsumexp(self._bounds.masked_fill(self._open, -torch.inf), 1)
        bound = torch.sigmoid(dropped - lse[given.labels >= 0])
        opened = float(self.counts[self._open].sum()) / self.shard.classes.num_classes
        self.certificate = Certificate(bound, opened)

    def moved(self, rows: Rows, w: Tensor, inverse_norm: Tensor) -> None:
        """Follows the largest angle of the open clusters, all of whose rows move."""
        assigned = self.assignment[rows].long()
        cosine = (w.to(self.shard.acc) * self.centroids[assigned]).sum(1) * inverse_norm
        self._fresh.scatter_reduce_(0, assigned, cosine, "amin")

    def settle(self, active: ActiveRows) -> None:
        """The open clusters' radii are those just measured."""
        moved = self._fresh < _NONE
        self._nearest = torch.where(moved, self._fresh, self._nearest)
        self._fresh.fill_(_NONE)
        self.radius = self._global_radius()

    def expected(self, step: int) -> Tensor | None:
        """Unknown before the features are."""
        return None

    def row_state(self) -> dict[str, Tensor]:
        """The cluster of each class."""
        return {"assignment": self.assignment}

    def shared_state(self) -> dict[str, Tensor]:
        """The centroids, and the step they were made at."""
        return {"centroids": self.centroids, "fitted": self._fitted}

    def rebuild(self) -> None:
        """Clusters from scratch."""
        self._start(self._seed)
        self._fit()

    def restored(self) -> None:
        """Counts and radii follow from assignment and centroids."""
        self._measure()

    def follow(self) -> None:
        """Everything on the shard's device, in its precision."""
        device, acc = self.shard.device, self.shard.acc
        self.centroids = self.centroids.to(device, acc)
        self._nearest, self._fresh = self._nearest.to(device, acc), self._fresh.to(device, acc)
        self.assignment, self._fitted = self.assignment.to(device), self._fitted.to(device)
        self._measure()

    def _start(self, seed: int) -> None:
        """The first centroids: random classes, the same on any number of ranks."""
        classes, generator = self.shard.classes, torch.Generator().manual_seed(seed)
        chosen = torch.randperm(classes.num_classes, generator=generator)[: self.spec.clusters]
        rows = self.shard.own_rows(chosen.to(self.shard.device))
        held = rows >= 0
        order = rows[held].argsort()
        columns, inverse = self.shard.load(rows[held][order])
        places = held.nonzero()[:, 0][order]
        self.centroids.zero_()
        self.centroids[places] = columns["weight"].to(self.shard.acc) * inverse[:, None]
        self.ranks.sum_(self.centroids)

    def _fit(self) -> None:
        """Spherical k-means; an empty cluster keeps its centroid."""
        for _ in range(self.spec.iterations):
            sums = torch.zeros_like(self.centroids, dtype=torch.float64)
            for _, unit in self._unit_tiles():
                nearest = (unit @ self.centroids.t()).argmax(1)
                sums.index_add_(0, nearest, unit.double())
            self.ranks.sum_(sums)
            length = sums.norm(dim=1, keepdim=True)
            fresh = (sums / length.clamp_min(1e-12)).to(self.centroids.dtype)
            self.centroids.copy_(torch.where(length > 1e-6, fresh, self.centroids))
        for rows, unit in self._unit_tiles():
            self.assignment[rows] = (unit @ self.centroids.t()).argmax(1).to(torch.int32)
        self._measure()

    def _measure(self) -> None:
        """Counts and radii of the clusters as they are."""
        self.counts = self.ranks.sum_(torch.bincount(self.assignment, minlength=self.spec.clusters))
        self._nearest.fill_(_NONE)
        self._fresh.fill_(_NONE)
        for rows, unit in self._unit_tiles():
            self.moved(rows, unit, torch.ones_like(unit[:, 0]))
        self.settle(ActiveRows())

    def _global_radius(self) -> Tensor:
        """Largest angle of each cluster over all ranks, float64 [E], with room for the cosines' rounding."""
        farthest = -self.ranks.max_(-self._nearest)
        return torch.arccos((farthest.double() - self._rounding).clamp(-1.0, 1.0))

    @property
    def _rounding(self) -> float:
        """The most that a cosine in the shard's precision is off: D products and their sum, two lengths."""
        return (self.centroids.shape[1] + 8) * torch.finfo(self.shard.acc).eps / 2

    def _log_bounds(self, scores: Tensor) -> Tensor:
        """Log of the most a cluster can add to a sample's denominator, float64 [V, E]; -inf if empty.

        The bound is on the logits as the walk computes them, rounding of the products included.
        """
        angle = torch.arccos((scores.double() + self._rounding).clamp(-1.0, 1.0))
        nearest = (angle - self.radius).clamp_min(0.0)
        narrow = self.shard.multiply == torch.bfloat16  # the feature is rounded, and so is its product
        rounding = self._rounding + (torch.finfo(torch.bfloat16).eps / 2 if narrow else 0.0)
        return torch.log(self.counts.double()) + self.shard.scale * (torch.cos(nearest) + rounding)

    def _own_clusters(self, given: GateInput) -> Tensor:
        """The cluster of each sample's class, int64 [B], -1 for ignored samples; known to every rank."""
        held = given.own_rows >= 0
        own = torch.full_like(given.labels, -1)
        own[held] = self.assignment[given.own_rows[held]].long()
        return self.ranks.max_(own)

    def _rows(self, clusters: Tensor) -> ActiveRows:
        return ActiveRows(clusters[self.assignment.long()].nonzero()[:, 0])

    def _unit_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        shard = self.shard
        for rows in shard.row_tiles():
            columns, inverse = shard.load(rows)
            yield rows, columns["weight"].to(shard.acc) * inverse[:, None]
