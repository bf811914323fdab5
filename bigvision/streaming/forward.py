"""The forward passes of inference: every pass over the image, in buffers that are written in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.streaming.buffers import Scanner
from bigvision.streaming.memory import freed_memory_kept
from bigvision.streaming.program import Program
from bigvision.streaming.schedule import schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.statistics import Sums


def weights_as(program: Program, dtype: torch.dtype, device: torch.device) -> dict[fx.Node, Tensor]:
    """The program's weights in the precision and on the device that it computes with."""
    return {node: _placed(tensor.detach(), dtype, device) for node, tensor in program.traced.tensors.items()}


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    placed = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return placed.contiguous(memory_format=torch.channels_last) if placed.ndim == 4 else placed


def forward(program: Program, image: ImageRows, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, y) of the padded image's output, [1, K, h, w'], `rows` image rows a step.

    A network with one answer for the image yields it once, as row 0.
    """
    with freed_memory_kept():
        held: dict[fx.Node, Any] = program.finish({}, weights_as(program, image.dtype, image.device))
        for walk in program.passes:
            plan = schedule(walk, rows)
            scanner = Scanner(walk, plan, held, image.dtype, image.device)
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
