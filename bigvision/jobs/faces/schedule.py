"""Learning rates as functions of the step: nothing to save, nothing to restore."""

from dataclasses import dataclass
from math import cos, pi

SHAPES = ("polynomial", "cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 over `warmup` steps to `peak`, then a fall to 0 at `total` steps.

    polynomial: peak * (1 - t)^power, cosine: peak * (1 + cos(pi t)) / 2, constant: peak; t runs from 0 to 1
    behind the warm-up. Raises ValueError for an unknown shape and lengths that can't be.
    """

    peak: float
    total: int
    warmup: int = 0
    shape: str = "polynomial"
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule {self.shape!r} is not one of {', '.join(SHAPES)}")
        if self.peak <= 0 or self.total < 1 or not 0 <= self.warmup < self.total:
            raise ValueError(
                f"a rate of {self.peak} over {self.total} steps after {self.warmup} steps of "
                "warm-up cannot be"
            )

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        t = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        if self.shape == "polynomial":
            return float(self.peak * (1 - t) ** self.power)
        return self.peak * (1 + cos(pi * t)) / 2 if self.shape == "cosine" else self.peak
