"""Locality-sensitive hashing as a gate: classes whose centre falls into a bucket of one of the batch's
features.

Legend: B gathered samples, D dimension, n classes of this shard, L tables, b bits of a code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision import gating
from bigvision.ranks import Ranks
from heads.gates import ActiveGate, GateInput, StaticGate
from heads.shard import ActiveRows, Shard
from heads.stores import Rows


@dataclass(frozen=True)
class Hashed:
    """Classes by hash collisions; see `hashed`."""

    tables: int
    bits: int
    collisions: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.collisions <= self.tables:
            raise ValueError(
                f"collisions must be 1 to {self.tables}, the number of tables, got {self.collisions}"
            )

    def build(self, shard: Shard, ranks: Ranks, seed: int) -> ActiveGate:
        """See `GateSpec.build`."""
        if shard.history is not None:
            raise ValueError("hash codes need idle rows that stay where they are (frozen)")
        return _HashGate(self, shard, seed)


def hashed(tables: int, bits: int, *, collisions: int = 1) -> Hashed:
    """A class takes part if its centre shares the codes of any of the batch's features in enough tables.

    A centre at angle a from a feature shares a code of b bits with probability (1 - a/pi)^b (Charikar
    2002), so more bits close the gate and more tables open it. The batch's own classes always take part.
    Codes follow the centres as these move.

    Args:
        tables: L hash tables.
        bits: b bits of a code, up to 24.
        collisions: in how many tables a class must be met.

    Raises:
        ValueError: a count outside its range.
    """
    return Hashed(tables, bits, collisions)


class _HashGate(StaticGate):
    def __init__(self, spec: Hashed, shard: Shard, seed: int) -> None:
        self.spec, self.shard = spec, shard
        dim = shard.store.whole("weight").shape[1]
        self.scorer = gating.HashScorer(dim, spec.tables, spec.bits, seed=seed).to(shard.device)
        shape = (len(shard.classes), spec.tables)
        self.scorer.expert_codes = torch.zeros(shape, dtype=torch.int32, device=shard.device)
        self.restored()

    def select(self, given: GateInput) -> ActiveRows:
        """Collisions with any valid sample of the batch, own classes forced."""
        collisions = self.scorer.union(given.unit[given.labels >= 0].float())
        force = torch.zeros_like(collisions, dtype=torch.bool)
        force[0, given.own_rows[given.own_rows >= 0]] = True
        return ActiveRows(gating.threshold(collisions, self.spec.collisions, force=force)[0].nonzero()[:, 0])

    def moved(self, rows: Rows, w: Tensor, inverse_norm: Tensor) -> None:
        """The moved centres' codes."""
        self.scorer.expert_codes[rows] = self.scorer.codes(w.float())

    def rebuild(self) -> None:
        """All centres' codes."""
        self.restored()

    def restored(self) -> None:
        """All centres' codes."""
        for rows in self.shard.row_tiles():
            columns, inverse = self.shard.load(rows)
            self.moved(rows, columns["weight"], inverse)

    def follow(self) -> None:
        """Planes and codes on the shard's device; they stay float32."""
        self.scorer.to(self.shard.device)
