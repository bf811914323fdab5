"""Measured seconds of a function: what a budget is counted in."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(function: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median seconds of one call, after one that warms up; waits for an accelerator to finish."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    function()
    took = []
    for _ in range(repeats):
        _finish()
        begun = time.perf_counter()
        function()
        _finish()
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
