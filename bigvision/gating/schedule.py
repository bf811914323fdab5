"""Warm starts: begin with many experts or a generous budget, and anneal to what is wanted."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Curve = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Anneal:
    """A number (a k, a threshold, a budget) that moves from ``begin`` to ``end`` over ``steps``, then stays.

    Attributes:
        begin: value at step 0.
        end: value from step ``steps`` on.
        steps: at least 0; with 0 it is ``end`` from the start.
        curve: "linear" or "cosine".
    """

    begin: float
    end: float
    steps: int
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if self.curve not in get_args(Curve):
            raise ValueError(f"curve must be one of {get_args(Curve)}, got {self.curve!r}")

    def at(self, step: int) -> float:
        """The value at ``step``; exactly ``begin`` at 0 and exactly ``end`` from ``steps`` on."""
        step = max(step, 0)
        if step >= self.steps:
            return self.end
        done = step / self.steps
        if self.curve == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.begin + (self.end - self.begin) * done


def value_at(value: float | Anneal, step: int) -> float:
    """A plain number as it is, an annealed one at ``step``."""
    return value.at(step) if isinstance(value, Anneal) else value
