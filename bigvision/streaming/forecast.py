"""The memory that a process takes while a network is streamed over a scene, chosen before a pixel is read.

One reckoning for `StreamedModel`, the jobs and their plans: what the process holds `Beside` the stream, and
what the stream takes forward or, differentiated, on its way back.

Legend: C bands, H, W rows and columns of the padded image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import psutil
import torch

from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.streaming.checkpoints import (
    BudgetError,
    CheckpointPlan,
    Scratch,
    plan_checkpoints,
    rows_a_step,
)
from bigvision.streaming.footprint import forward_bytes, step_bytes
from bigvision.streaming.plan import row_choices
from bigvision.streaming.program import Pass, Program

# Resident in a process that has loaded torch (its CUDA build alone 650 MiB) and a network. A constant, not a
# measurement, so that one command always cuts alike.
PROCESS_BYTES = 1000 * 2**20
WORKER_BYTES = 600 * 2**20  # the same of a worker, whose libraries are those of the first process
COMPILER_BYTES = 450 * 2**20  # of torch's compiler and its processes (measured: 170 and 250 MiB)
# What torch's libraries take once they compute, measured at 0.1 to 0.3 GiB on a CPU.
FIRST_USE = 200 * 2**20
# What the heap takes beyond the buffers asked of it, measured at 1.10 to 1.25.
HEAP_SLACK = 1.15
_HANDED_OVER = 4 + 4  # bytes a value of the rows that a step takes: float32, and padded
_LABELS = 32  # bytes a pixel of a gradient's labels: as read, masked, as int64 and one copy on the way


@dataclass(frozen=True)
class Beside:
    """What a process holds beside a stream.

    Attributes:
        fixed: bytes, whatever the rows of a step: libraries, weights, caches.
        row: bytes for every image row of a step: rows as they are read, and those read ahead.
    """

    fixed: int
    row: int = 0


def this_process(shape: tuple[int, int, int]) -> Beside:
    """What this process holds now and its libraries take once they compute; rows of an image [C, H, W]."""
    held = psutil.Process(os.getpid()).memory_info().rss + FIRST_USE
    return Beside(held, shape[0] * shape[2] * _HANDED_OVER)


def reading_bytes(channels: int, width: int, itemsize: int, *, floating: bool) -> int:
    """Of one row of an image [C, 1, W] on its way from a file into the stream.

    Rows stand there as float32 and padded while the next are read: as stored (`itemsize` bytes a value; a
    floating type once more, where what is not finite is replaced), masked, and normalised.
    """
    ahead = itemsize + 1 + 4 + (itemsize + 2 if floating else 0)
    return channels * width * (_HANDED_OVER + ahead)


def training_row_bytes(channels: int, width: int, itemsize: int, *, floating: bool) -> int:
    """The same where labels are read beside the image."""
    return reading_bytes(channels, width, itemsize, floating=floating) + _LABELS * width


def forward_rows(
    program: Program,
    stride: int,
    dtype: torch.dtype,
    beside: Beside,
    memory: int | None = None,
    rows: int | None = None,
) -> tuple[int, int]:
    """(image rows a step, peak bytes of the process), the best step that fits.

    Args:
        stride: the network's total stride; a step is a multiple of it where memory allows.
        memory: bytes that the whole process may take; None: no limit.
        rows: asked for by the user; None: planned.

    Raises:
        ValueError: `rows` is below 1.
        BudgetError: no step fits; `least` is what the process would take with the smallest.
    """
    height, width = program.traced.shape[1:]
    if rows is not None and rows < 1:
        raise ValueError(f"a step takes at least 1 row of the image, not {rows}")
    found = []
    for choice in row_choices(height, width, stride) if rows is None else [min(rows, height)]:
        stream = int(HEAP_SLACK * (forward_bytes(program, choice, dtype) + beside.row * choice))
        found.append((beside.fixed + stream, choice))
        if memory is None or found[-1][0] <= memory:
            return choice, found[-1][0]
    least, choice = min(found)
    raise BudgetError(
        f"streaming {tuple(program.traced.shape)} takes at least {least / 2**30:.2f} GiB "
        f"({rows_a_step(choice)}; {beside.fixed / 2**30:.2f} GiB are the process's own), "
        f"more than the {(memory or 0) / 2**30:.2f} GiB it may take",
        least,
    )


@dataclass(frozen=True)
class Budget:
    """What a backward pass may use.

    Attributes:
        rows: image rows a step; None: planned.
        memory: bytes on top of what the process holds already; None: every state is kept in memory.
        scratch: where states may be spilled.
        row: bytes of it that reading takes for every image row of a step.
    """

    rows: int | None = None
    memory: int | None = None
    scratch: Scratch | None = None
    row: int = 0

    def less(self, beside: Beside) -> Budget:
        """The same, where `memory` was meant for the whole process."""
        left = None if self.memory is None else max(self.memory - beside.fixed, 0)
        return replace(self, memory=left, row=beside.row)


def plan_backward(program: Program, dtype: torch.dtype, budget: Budget) -> tuple[CheckpointPlan, ...]:
    """How every pass would be differentiated under the budget, without doing it.

    Raises:
        UnsupportedOperatorError: the network has a gradient of its own somewhere, which its graph has not.
        BudgetError: the budget can't hold the state and tape of a step; `least` is what the most demanding
            pass takes.
    """
    if program.traced.ungradable:
        raise UnsupportedOperatorError(
            f"the network's gradient can't be streamed, only its result: its graph lacks "
            f"{'; '.join(program.traced.ungradable)}"
        )
    plans, refused = [], []
    for walk in program.passes:
        try:
            plans.append(_plan_pass(program, walk, dtype, budget))
        except BudgetError as error:
            refused.append(error)
    if refused:
        raise max(refused, key=lambda error: error.least)
    return tuple(plans)


def _plan_pass(program: Program, walk: Pass, dtype: torch.dtype, budget: Budget) -> CheckpointPlan:
    height = walk.stages[0].size
    if budget.rows is not None:
        rows = [min(budget.rows, height)]
    else:
        rows = [r for r in (16, 32, 48, 64, 96, 128, 192, 256) if r < height] or [height]
    scratch = budget.scratch.limit if budget.scratch else 0

    def planned(choices: list[int]) -> CheckpointPlan:
        steps = [step_bytes(program, walk, r, dtype) for r in choices]
        read = [replace(one, working=one.working + budget.row * one.rows) for one in steps]
        return plan_checkpoints(read, budget.memory, scratch)

    try:
        return planned(rows)
    except BudgetError:
        if budget.rows is not None:
            raise
    return planned([r for r in (1, 2, 4, 8) if r <= height])
