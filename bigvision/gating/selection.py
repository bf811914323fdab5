"""Selections as values, so that a gate can hold one and anneal it.

Legend: T tokens, E experts.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .schedule import Anneal, value_at
from .select import expert_choice, threshold, top_k


def round_up(value: float) -> int:
    """Ceiling, but 0.07 * 100 is 7: a rounding error above is not a token more."""
    return math.ceil(value - 1e-9)


class Selection(Protocol):
    """What a gate needs of a selection."""

    def select(
        self,
        scores: Tensor,
        *,
        step: int,
        force: Tensor | None,
        allowed: Tensor | None,
        previous: Tensor | None,
    ) -> Tensor:
        """Mask bool [T, E] of scores [T, E]."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k best experts of each token; see :func:`~bigvision.gating.select.top_k`.

    Attributes:
        k: at least 0; an annealed k is rounded up.
    """

    k: int | Anneal = 1

    def __post_init__(self) -> None:
        lowest = min(self.k.begin, self.k.end) if isinstance(self.k, Anneal) else self.k
        if lowest < 0:
            raise ValueError(f"k must be at least 0, got {self.k}")

    @property
    def final(self) -> int:
        """k when annealing is over."""
        return round_up(self.k.end if isinstance(self.k, Anneal) else self.k)

    def select(
        self,
        scores: Tensor,
        *,
        step: int = 0,
        force: Tensor | None = None,
        allowed: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Mask bool [T, E]; ``previous`` has no say."""
        return top_k(scores, round_up(value_at(self.k, step)), force=force, allowed=allowed)


@dataclass(frozen=True)
class Threshold:
    """All pairs above a threshold, with hysteresis; see :func:`~bigvision.gating.select.threshold`.

    Attributes:
        tau: where a pair turns on.
        gap: a pair that was on turns off below ``tau - gap``; at least 0.
    """

    tau: float | Anneal
    gap: float = 0.0

    def __post_init__(self) -> None:
        if not self.gap >= 0:
            raise ValueError(f"gap must be at least 0, got {self.gap}")

    def select(
        self,
        scores: Tensor,
        *,
        step: int = 0,
        force: Tensor | None = None,
        allowed: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Mask bool [T, E]; without ``previous`` there is no hysteresis."""
        tau = value_at(self.tau, step)
        tau_off = None if previous is None else tau - self.gap
        return threshold(scores, tau, tau_off=tau_off, previous=previous, force=force, allowed=allowed)


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes its best share of the tokens; see :func:`~bigvision.gating.select.expert_choice`.

    Attributes:
        share: of all tokens, 0 to 1, that an expert takes (rounded up): the budget.
    """

    share: float | Anneal

    def __post_init__(self) -> None:
        ends = (self.share.begin, self.share.end) if isinstance(self.share, Anneal) else (self.share,)
        if not all(0 <= end <= 1 for end in ends):
            raise ValueError(f"share must be in 0..1, got {self.share}")

    def select(
        self,
        scores: Tensor,
        *,
        step: int = 0,
        force: Tensor | None = None,
        allowed: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Mask bool [T, E]; refuses ``force``, which would break the budget."""
        if force is not None:
            raise ValueError("expert choice takes no forced pairs: an expert's budget has no room for them")
        capacity = round_up(value_at(self.share, step) * len(scores))
        return expert_choice(scores, capacity, allowed=allowed)
