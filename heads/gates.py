"""Which classes take part in a step. Every choice is a selection of `bigvision.gating`.

A gate is described by a frozen value (`sampled`, `clustered`, `hashed`) and built for one rank's shard.

Legend: B gathered samples, D dimension, n classes of this shard, A active ones.
"""

from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
from torch import Tensor

from bigvision import gating
from bigvision.ranks import Ranks
from heads.shard import ActiveRows, Shard
from heads.stores import Rows


@dataclass(frozen=True)
class GateInput:
    """What a gate sees: unit features acc [B, D], labels int64 [B], and their rows in this shard (or -1)."""

    unit: Tensor
    labels: Tensor
    own_rows: Tensor
    step: int


class ActiveGate(Protocol):
    """A gate at work on one shard. Its methods are called on every rank together.

    `select`, `widen` and `certify` change nothing that a copy of the gate shares with it, so that a copy can
    be asked what the gate would do.
    """

    def renew(self, step: int) -> None:
        """A step of training begins: what is made anew from time to time is, if it is time."""
        ...

    def select(self, given: GateInput) -> ActiveRows:
        """The classes of this step; every own class is among them."""
        ...

    def widen(self, given: GateInput, active: ActiveRows, lse: Tensor) -> ActiveRows | None:
        """Further, other classes, once the log-denominators so far, float64 [B], are known."""
        ...

    def certify(self, given: GateInput, lse: Tensor) -> None:
        """Records what the gate can say of the mass it left out, given the final log-denominators [B]."""
        ...

    def moved(self, rows: Rows, w: Tensor, inverse_norm: Tensor) -> None:
        """A tile [K, D] of active rows has been updated."""
        ...

    def settle(self, active: ActiveRows) -> None:
        """All tiles of a step have been updated."""
        ...

    def expected(self, step: int) -> Tensor | None:
        """Rows int64 that a later step will want, as far as that is known now: for prefetching."""
        ...

    def row_state(self) -> dict[str, Tensor]:
        """Live tensors [n, ...] with a row a class of this shard, for checkpoints to read and write."""
        ...

    def shared_state(self) -> dict[str, Tensor]:
        """Live tensors that are the same on every rank, for checkpoints to read and write."""
        ...

    def rebuild(self) -> None:
        """The rows are others now: start over."""
        ...

    def restored(self) -> None:
        """A checkpoint has been read into the tensors and the rows."""
        ...

    def follow(self) -> None:
        """The shard is on another device, or of another dtype."""
        ...


class GateSpec(Protocol):
    """The description of a gate."""

    def build(self, shard: Shard, ranks: Ranks, seed: int) -> ActiveGate:
        """The gate for one shard. Raises ValueError where it doesn't fit the classes."""
        ...


class StaticGate:
    """The parts of a gate that keeps nothing: nothing to widen, follow or save."""

    def renew(self, step: int) -> None:
        """Nothing to make anew."""

    def widen(self, given: GateInput, active: ActiveRows, lse: Tensor) -> ActiveRows | None:
        """Nothing more."""
        return None

    def certify(self, given: GateInput, lse: Tensor) -> None:
        """Nothing to say."""

    def moved(self, rows: Rows, w: Tensor, inverse_norm: Tensor) -> None:
        """Nothing to follow."""

    def settle(self, active: ActiveRows) -> None:
        """Nothing to follow."""

    def expected(self, step: int) -> Tensor | None:
        """Unknown."""
        return None

    def row_state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def rebuild(self) -> None:
        """Nothing to do."""

    def restored(self) -> None:
        """Nothing to do."""

    def follow(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Sampled:
    """Random classes with the batch's own classes forced; see `sampled`."""

    rate: float
    run: int = 1
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"the sample rate must be in (0, 1], got {self.rate}")
        if self.run < 1:
            raise ValueError(f"runs must hold at least one class, got {self.run}")

    def build(self, shard: Shard, ranks: Ranks, seed: int) -> ActiveGate:
        """See `GateSpec.build`."""
        return _SampledGate(self, shard, seed)


class _SampledGate(StaticGate):
    def __init__(self, spec: Sampled, shard: Shard, seed: int) -> None:
        self.spec, self.shard, self.seed = spec, shard, seed

    def select(self, given: GateInput) -> ActiveRows:
        count, device = len(self.shard.classes), given.unit.device
        force = torch.zeros(1, count, dtype=torch.bool, device=device)
        force[0, given.own_rows[given.own_rows >= 0]] = True
        rows = self._mask(given.step, force)[0].nonzero()[:, 0]
        if not self.spec.unbiased:
            return ActiveRows(rows)
        # A forced class is there with probability 1, any other with probability r.
        heaviest = -log(self.spec.rate)
        log_weight = torch.where(force[0, rows], 0.0, heaviest).to(self.shard.acc)
        return ActiveRows(rows, log_weight, heaviest)

    def _mask(self, step: int, force: Tensor | None) -> Tensor:
        """bool [1, n]: the one token is the batch, the experts are all classes, drawn in runs."""
        classes, run = self.shard.classes, self.spec.run
        first, last = classes.start // run, -(-classes.stop // run)
        token = torch.zeros(1, dtype=torch.int64, device=self.shard.inverse_norm.device)
        scores = gating.random_scores(self.seed, step, token, (first, last))
        if run > 1:
            scores = scores.repeat_interleave(run, dim=1)[:, classes.start - first * run :]
        return gating.threshold(scores[:, : len(classes)], 1.0 - self.spec.rate, force=force)

    def expected(self, step: int) -> Tensor | None:
        """The random part of the step's classes; its own classes are known when its labels are."""
        return self._mask(step, None)[0].nonzero()[:, 0]


def sampled(rate: float, *, run: int = 1, unbiased: bool = False) -> Sampled:
    """Each class is active with probability `rate`, and every class of the batch is (Partial FC, An et al.
    2022).

    The draw is a function of (seed, step, global class id), so the set is the same on any number of ranks.

    Args:
        rate: r in (0, 1].
        run: draw whole runs of this many consecutive classes, so that reads from a disk are sequential.
        unbiased: add log(1/r) to the logits of the classes that were drawn and not forced. The sampled
            denominator then has the full denominator as its expectation. Its logarithm, and so the loss, is
            still biased (low, by Jensen's inequality).

    Raises:
        ValueError: a rate or run outside its range.
    """
    return Sampled(rate, run, unbiased)
