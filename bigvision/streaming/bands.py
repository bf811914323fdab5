"""Passes over a part of the image: the rows of one band, exactly as a walk over the whole image makes them.

A band's share of a pass is its share of the whole image's schedule: every operator makes only those of its
rows that the band's own rows or sums need, at the places of the whole image. So bands are exact whatever the
network, can be computed anywhere in any order, and what they give adds up to the whole.

Where passes keep values for later ones (`spill.py`), each band keeps its share of them, in a folder that all
that compute bands can reach; a phase may only begin once every band of the one before it is done.

Legend: a, b rows of a stage, half open; t step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from bigvision.streaming.forward import scanned
from bigvision.streaming.held import Held, weights_of
from bigvision.streaming.model import StreamedModel
from bigvision.streaming.program import Pass, Program, Stage
from bigvision.streaming.row_store import GivenRows, RowStore
from bigvision.streaming.scan import StepResult
from bigvision.streaming.schedule import Schedule, schedule
from bigvision.streaming.source import RowSource
from bigvision.streaming.statistics import Sums

Rows = tuple[int, int]
OnStep = Callable[[float], object]
PhaseSums = dict[str, Sums]
"""The float64 sums of one phase's statistics, by the name of their operator in the graph."""


@dataclass(frozen=True)
class BandedStream:
    """A streamed network over one scene, band by band and phase by phase.

    Attributes:
        model: prepared for the scene's shape; in its scratch folder, if it has one, passes keep their values.
        source: the scene.
    """

    model: StreamedModel
    source: RowSource

    @property
    def program(self) -> Program:
        """The network's stages and passes."""
        return self.model.inference

    @property
    def phases(self) -> int:
        """How many passes take statistics before the one that gives the output."""
        return len(self.program.passes) - 1

    def sums(
        self, phase: int, band: Rows, before: Sequence[PhaseSums], on_step: OnStep | None = None
    ) -> PhaseSums:
        """A band's part of a phase's sums.

        Args:
            phase: counted from 0.
            band: rows of the padded image; the bands of a phase must cover it without overlapping.
            before: the whole sums of all earlier phases.
            on_step: is told after each step which part of the pass over this band is done, 1 at the end.
        """
        found: dict[fx.Node, Sums] = {}
        steps, scan = self._scan(phase, band, before, found)
        for step, _ in enumerate(scan, 1):
            if on_step is not None and step < steps:
                on_step(step / steps)
        if on_step is not None:
            on_step(1.0)
        return {node.name: sums for node, sums in found.items()}

    def merged(self, bands: Sequence[PhaseSums]) -> PhaseSums:
        """The whole sums of a phase, from all its bands' parts from top to bottom."""
        whole: PhaseSums = {}
        for node, statistic in self.program.statistics.items():
            for part in (band[node.name] for band in bands if node.name in band):
                known = whole.get(node.name)
                whole[node.name] = part if known is None else statistic.merge(known, part)
        return whole

    def rows(self, band: Rows, before: Sequence[PhaseSums]) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, y): output rows [1, K, h, W'] of the padded image, in order: the band's alone."""
        for done in self._scan(self.phases, band, before, {})[1]:
            if done.output is not None:
                yield done.row, done.output

    def _scan(
        self, index: int, band: Rows, before: Sequence[PhaseSums], sums: dict[fx.Node, Sums]
    ) -> tuple[int, Iterator[StepResult]]:
        """The steps of a pass over a band, and how many; its statistics are added up in `sums`."""
        model, program = self.model, self.program
        walk, plan = banded(program.passes[index], schedule(program.passes[index], model.rows), band)
        with torch.no_grad():
            held = _held(program, before, model.device)
        given = GivenRows(program.traced.image, model.image(self.source), self._store())
        return plan.steps, scanned(program, walk, plan, held, given, sums)

    def forget(self, phase: int) -> None:
        """Delete the values that no phase after this one starts from; every band of it must be done."""
        if (store := self._store()) is not None:
            later = self.program.passes[phase + 1 :]
            store.retain(frozenset().union(*(walk.given for walk in later)))

    def _store(self) -> RowStore | None:
        scratch = self.model.budget.scratch
        if scratch is None or not self.program.boundaries:
            return None
        scratch.folder.mkdir(parents=True, exist_ok=True)
        return RowStore(scratch.folder, self.model.dtype, self.model.device)


def banded(walk: Pass, plan: Schedule, band: Rows) -> tuple[Pass, Schedule]:
    """The part of a pass, and of its schedule, that a band of image rows needs."""
    needed = _needed(walk, band)
    if not needed:  # of a pass that starts from few rows a band can have none
        return replace(walk, stages=()), Schedule(0, {}, {})
    stages = tuple(stage for stage in walk.stages if stage.node in needed)
    made = {node: np.clip(plan.made[node], *rows) for node, rows in needed.items()}
    kept = {node: np.clip(plan.kept[node], *rows) for node, rows in needed.items()}
    busy = np.any([np.diff(progress) > 0 for progress in made.values()], axis=0)
    first, last = int(np.argmax(busy)), len(busy) - int(np.argmax(busy[::-1]))
    steps = slice(first, last + 1)
    ends = {*(one.source for one in walk.statistics), *(stage.node for stage in walk.spilled)}
    shares = {stage.node: _share(stage, band, walk.height) for stage in stages if stage.node in ends}
    return replace(walk, stages=stages, shares=shares), Schedule(
        last - first,
        {node: progress[steps] for node, progress in made.items()},
        {node: rows[steps] for node, rows in kept.items()},
    )


def _needed(walk: Pass, band: Rows) -> dict[fx.Node, Rows]:
    """The rows of every stage that a band's own rows and sums depend on; stages without any are left out."""
    ends = {walk.stages[0].node, *(one.source for one in walk.statistics)}
    ends |= {stage.node for stage in walk.spilled}
    if walk.output is not None:
        ends.add(walk.output.node)
    needed: dict[fx.Node, Rows] = {}
    for stage in reversed(walk.stages):
        if stage.node in ends:
            _widen(needed, stage.node, _share(stage, band, walk.height))
        if stage.node in needed:
            read = stage.span(*needed[stage.node]).read if stage.rows else needed[stage.node]
            for source in stage.inputs:
                _widen(needed, source, read)
    return needed


def _share(stage: Stage, band: Rows, height: int) -> Rows:
    """A stage's own rows of a band: the shares of bands that cover the image cover the stage."""
    return band[0] * stage.size // height, band[1] * stage.size // height


def _widen(needed: dict[fx.Node, Rows], node: fx.Node, rows: Rows) -> None:
    if rows[0] < rows[1]:
        known = needed.get(node, rows)
        needed[node] = min(known[0], rows[0]), max(known[1], rows[1])


def _held(program: Program, before: Sequence[PhaseSums], device: torch.device) -> Held:
    """Weights, statistics of earlier phases, and what is computed from them."""
    held = program.finish({}, weights_of(program, device))
    for sums in before:
        named = {node: sums[node.name] for node in program.statistics if node.name in sums}
        held = program.finish(named, held)
    return held
