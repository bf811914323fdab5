"""Measured seconds of a function: what a budget is counted in."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigvision.routing.boxes import Box
from bigvision.routing.experts import RegionExpert, Skip
from bigvision.routing.pasting import cut


def seconds(
    function: Callable[[], Any], *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of one call, after one that warms up; waits for an accelerator to finish.

    clock: `time.process_time` counts this process's work on the CPU, whatever else the machine does.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    function()
    took = []
    for _ in range(repeats):
        _finish()
        begun = clock()
        function()
        _finish()
        took.append(clock() - begun)
    return statistics.median(took)


def region_seconds(
    one: RegionExpert, region: int, clock: Callable[[Callable[[], Any]], float], like: Tensor
) -> tuple[float, float]:
    """Seconds that an expert takes for one region among others, halo included, and seconds a FLOP.

    Args:
        one: the expert; skipping takes no time.
        region: side in pixels, a multiple of the expert's stride.
        clock: runs a function and returns its seconds, such as :func:`seconds`.
        like: a tensor of the device and dtype that the expert computes in.
    """
    if isinstance(one.module, Skip):
        return 0.0, 0.0
    side = 3 * region
    program = one.program(side, side)
    middle = Box(*(int(edge / one.shape.scale) for edge in Box(1, 1, 2, 2).scaled(region)))
    job = program.job(middle)
    x = torch.zeros(1, one.channels, side, side, dtype=like.dtype, device=like.device)
    took = clock(lambda: program.run(cut(x, [(0, job.read)]), job.alike))
    return took, took / max(program.flops(middle), 1.0)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
