"""The forward passes of inference: every pass over the image, in buffers that are written in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, fx

from bigvision.streaming.buffers import Scanner
from bigvision.streaming.held import Held, narrowed, weights_of
from bigvision.streaming.memory import freed_memory_kept
from bigvision.streaming.program import Pass, Program
from bigvision.streaming.row_store import GivenRows, temporary_rows
from bigvision.streaming.scan import StepResult
from bigvision.streaming.schedule import Schedule, schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.statistics import Sums


def forward(
    program: Program, image: ImageRows, rows: int, scratch: Path | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, y) of the padded image's output, [1, K, h, w'], `rows` image rows a step.

    A network with one answer for the image yields it once, as row 0. A program with boundaries keeps their
    values in the folder `scratch`.
    """
    with ExitStack() as open_until_done:
        open_until_done.enter_context(freed_memory_kept())
        store = None
        if program.boundaries:
            assert scratch is not None
            store = open_until_done.enter_context(temporary_rows(scratch, image.dtype, image.device))
        given = GivenRows(program.traced.image, image, store)
        with torch.autocast(image.device.type, enabled=False):
            held = program.finish({}, weights_of(program, image.device))
        for index, walk in enumerate(program.passes):
            sums: dict[fx.Node, Sums] = {}
            for done in scanned(program, walk, schedule(walk, rows), held, given, sums):
                if done.output is not None:
                    yield done.row, done.output
            with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
                held = program.finish(sums, held)
            if store is not None:
                store.retain(frozenset().union(*(later.given for later in program.passes[index + 1 :])))
        if program.output not in program.stages:
            yield 0, held[program.output]


def scanned(
    program: Program,
    walk: Pass,
    plan: Schedule,
    held: Held,
    given: GivenRows,
    sums: dict[fx.Node, Sums],
) -> Iterator[StepResult]:
    """Every step of a pass; its statistics' sums are added up in `sums`."""
    image = given.image
    scanner = Scanner(walk, plan, narrowed(held, image.dtype), given, image.dtype, image.device)
    for t in range(plan.steps):
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):  # the scene's own precision
            done = scanner.advance(t)
        for node, part in done.sums.items():
            sums[node] = program.statistics[node].merge(sums[node], part) if node in sums else part
        yield done
