"""What streaming a scene will take, and the number of rows a step, chosen before a pixel is read.

Legend: H, W rows and columns of the padded image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from bigvision.streaming.checkpoints import BudgetError, CheckpointPlan, rows_a_step
from bigvision.streaming.footprint import forward_bytes
from bigvision.streaming.program import Program

# A step of about a million pixels is long enough to be efficient and short enough for the caches. Measured
# on a U-Net: at width 30000, 32 rows are as quick as 64 in bfloat16 on AMX and 1.2 times so in float32; 16
# are not. At width 8192, 64 to 224 rows are within 6 %; at 1024 and 4096, 128 to 256 are best.
PIXELS_A_STEP = 1_000_000
MOST_ROWS = 256
# What the heap takes beyond the buffers asked of it, measured at 1.10 to 1.25.
HEAP_SLACK = 1.15
# What torch's libraries take once they compute, measured at 0.1 to 0.3 GiB on a CPU.
FIRST_USE = 200 * 2**20


@dataclass(frozen=True)
class StreamPlan:
    """What one forward stream takes.

    Attributes:
        rows: image rows a step.
        steps: of all passes together.
        passes: walks over the image, one more than there are stages of statistics over it.
        engine_bytes: the most that buffers, results and weights take at once.
        peak_bytes: that and what the process holds already: its predicted peak.
        flops: of all passes together.
        recomputation: FLOPs done more than once, as a share of one dense forward.
        scratch_bytes: the most that values between passes take in scratch storage.
        training: how every pass would be differentiated under the same memory; None where it can't be.
    """

    rows: int
    steps: int
    passes: int
    engine_bytes: int
    peak_bytes: int
    flops: int
    recomputation: float
    scratch_bytes: int
    training: tuple[CheckpointPlan, ...] | None


def plan_rows(
    program: Program, stride: int, rows: int | None, memory: int | None, dtype: torch.dtype
) -> tuple[int, int]:
    """(image rows a step, predicted peak bytes of the process).

    Args:
        stride: the network's total stride; a step is a multiple of it where memory allows.
        rows: asked for by the user; None: planned.
        memory: bytes that the whole process may take; None: no limit.

    Raises:
        ValueError: `rows` is below 1.
        BudgetError: not even the smallest step fits; the message says what it takes.
    """
    height, width = program.traced.shape[1:]
    if rows is not None and rows < 1:
        raise ValueError(f"a step takes at least 1 row of the image, not {rows}")
    choices = row_choices(height, width, stride) if rows is None else [min(rows, height)]
    process = psutil.Process(os.getpid()).memory_info().rss + FIRST_USE
    for choice in choices:
        peak = process + int(HEAP_SLACK * forward_bytes(program, choice, dtype))
        if memory is None or peak <= memory:
            return choice, peak
    raise BudgetError(
        f"streaming {tuple(program.traced.shape)} takes at least {peak / 2**30:.2f} GiB "
        f"({rows_a_step(choices[-1])}; {process / 2**30:.2f} GiB are the process's own), "
        f"more than the {memory / 2**30:.2f} GiB it may take",  # type: ignore[operator]
        peak,
    )


def row_choices(height: int, width: int, stride: int) -> list[int]:
    """Image rows a step that are worth trying, the best first and each half of the one before, down to 1."""
    most = min(PIXELS_A_STEP // width, MOST_ROWS, height)
    most = most // stride * stride or min(stride, height)
    return [most >> shift for shift in range(most.bit_length())]


def pass_flops(program: Program) -> list[int]:
    """FLOPs of every pass."""
    return [
        sum(stage.flops for stage in walk.stages if stage.node not in walk.given) for walk in program.passes
    ]
