"""Between many passes: the values at a pass's end go to scratch storage, and the next one starts from them.

A network with a statistic in every block (squeeze-and-excite) takes as many passes as it has blocks; each
would start again from the image. Where the scratch storage is large enough, a pass reads what the one before
it kept and computes only what is new.

Legend: q, b passes; a boundary behind b lets the passes after b start there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from bigvision.streaming.footprint import row_bytes
from bigvision.streaming.program import Boundary, Pass, Program

# Writing a byte to scratch storage and reading it again takes as long as so many FLOPs: a disk of 1 GB/s
# beside a processor of 200 GFLOP/s.
FLOPS_A_BYTE = 200


def spilled(program: Program, dtype: torch.dtype, limit: int) -> Program:
    """The program with the boundaries that save the most work in `limit` bytes of scratch storage.

    Boundaries are chosen by dynamic programming over the passes: best[b] is the least cost (FLOPs, with bytes
    at their price) of all passes up to b when b's values are kept.
    """
    choice = _Choice(program, dtype, limit)
    best: dict[int, tuple[float, tuple[Boundary, ...]]] = {-1: (0, ())}
    for b in range(program.depth - 1):
        end = Boundary(b, frontier(program, b))
        reached = [choice.extended(*best[q], q, b, end) for q in best]
        best[b] = min(reached, key=lambda one: one[0])
    last = program.depth - 1
    return replace(
        program,
        boundaries=min((choice.extended(*best[q], q, last, None) for q in best), key=lambda one: one[0])[1],
    )


def frontier(program: Program, index: int) -> frozenset[fx.Node]:
    """What later passes read of values that are known by the end of pass `index` (the image aside)."""
    return frozenset(
        source
        for stage in program.stages.values()
        if stage.level > index
        for source in stage.inputs
        if program.stages[source].level <= index
        and not program.stages[source].free
        and source is not program.traced.image
    )


def scratch_bytes(program: Program, dtype: torch.dtype) -> int:
    """The most bytes that the program's boundaries take at once."""
    ends = [frozenset[fx.Node](), *(boundary.values for boundary in program.boundaries)]
    return max((_bytes(program, before | after, dtype) for before, after in pairwise(ends)), default=0)


@dataclass(frozen=True)
class _Choice:
    """The cost of running from one boundary to the next."""

    program: Program
    dtype: torch.dtype
    limit: int

    def extended(
        self, cost: float, ends: tuple[Boundary, ...], q: int, b: int, end: Boundary | None
    ) -> tuple[float, tuple[Boundary, ...]]:
        """(cost, boundaries) once the passes behind q up to b have run and b's `end`, if any, is kept."""
        given = ends[-1].values if ends else frozenset[fx.Node]()
        kept = frozenset[fx.Node]() if end is None else end.values
        if end is not None and _bytes(self.program, given | kept, self.dtype) > self.limit:
            return float("inf"), ends
        for index in range(q + 1, b + 1):
            walk = self.program.walk(index, given, kept - given if index == b else frozenset())
            cost += self._cost(walk)
        return cost, ends if end is None else (*ends, end)

    def _cost(self, walk: Pass) -> float:
        computed = sum(stage.flops for stage in walk.stages if stage.node not in walk.given)
        moved = {*walk.given, *(stage.node for stage in walk.spilled)} - {self.program.traced.image}
        return computed + FLOPS_A_BYTE * _bytes(self.program, moved, self.dtype)


def _bytes(program: Program, nodes: Iterable[fx.Node], dtype: torch.dtype) -> int:
    stages = (program.stages[node] for node in nodes)
    return sum(stage.size * row_bytes(stage, dtype) for stage in stages)
