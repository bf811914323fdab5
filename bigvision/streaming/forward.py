"""The forward passes of inference: every pass over the image, in buffers that are written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from bigvision.streaming.buffers import Scanner
from bigvision.streaming.held import narrowed, weights_of
from bigvision.streaming.memory import freed_memory_kept
from bigvision.streaming.program import Program
from bigvision.streaming.schedule import schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.statistics import Sums


def forward(program: Program, image: ImageRows, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, y) of the padded image's output, [1, K, h, w'], `rows` image rows a step.

    A network with one answer for the image yields it once, as row 0.
    """
    with freed_memory_kept():
        held = program.finish({}, weights_of(program, image.device))
        for walk in program.passes:
            plan = schedule(walk, rows)
            scanner = Scanner(walk, plan, narrowed(held, image.dtype), image.dtype, image.device)
            sums: dict[fx.Node, Sums] = {}
            pace = plan.made[walk.stages[0].node]
            row = 0
            for t in range(plan.steps):
                with torch.inference_mode():
                    y, taken = scanner.advance(t, image.read(int(pace[t]), int(pace[t + 1])))
                for node, part in taken.items():
                    sums[node] = program.statistics[node].merge(sums[node], part) if node in sums else part
                if y is not None:
                    yield row, y
                    row += y.shape[walk.output.axis]  # type: ignore[union-attr]
            with torch.inference_mode():
                held = program.finish(sums, held)
        if program.output not in program.stages:
            yield 0, held[program.output]
