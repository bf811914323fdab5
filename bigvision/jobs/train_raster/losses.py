"""Losses by name: `cross_entropy`, `dice`, `focal` and weighted sums of them."""

from collections.abc import Callable

from torch import Tensor

from bigvision.streaming.losses import CrossEntropy, Dice, Focal, Loss, WeightedSum
from datasets.pairs import IGNORE

LOSSES: dict[str, Callable[[Tensor | None], Loss]] = {
    "cross_entropy": lambda weight: CrossEntropy(weight, ignore_index=IGNORE),
    "dice": lambda weight: Dice(weight, ignore_index=IGNORE),
    "focal": lambda weight: Focal(weight=weight, ignore_index=IGNORE),
}


def parse_terms(text: str) -> list[tuple[float, str]]:
    """`cross_entropy+0.5*dice` as [(1, "cross_entropy"), (0.5, "dice")]; ValueError for anything else."""
    terms = []
    for part in text.split("+"):
        factor, _, name = part.strip().rpartition("*")
        try:
            value = float(factor) if factor else 1.0
        except ValueError:
            value = float("nan")
        if name.strip() not in LOSSES or not value > 0:
            raise ValueError(
                f"--loss {text!r}: {part.strip()!r} is not [factor *] one of {', '.join(LOSSES)}"
            )
        terms.append((value, name.strip()))
    return terms


def build_loss(text: str, weight: Tensor | None = None) -> Loss:
    """The weighted sum of the losses that `text` names; `weight` has one number a class."""
    return WeightedSum([(factor, LOSSES[name](weight)) for factor, name in parse_terms(text)])
