"""Measured seconds of a function: what a budget is counted in."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


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


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
