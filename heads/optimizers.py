"""The optimisers, one row at a time: what happens to a tile of centres once its gradient is complete.

Legend: K rows, D dimension. w, gradient and moments are acc [K, D] inside; accumulators and counts are [K].
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD has it: d = g + weight_decay*w, m = momentum*m + d, w -= lr*m.

    `inactive` says what happens to classes that the gate left out: "frozen" rows and their momentum stay bit-identical;
    "dense" rows move exactly as they would have with a zero gradient, caught up when they are next touched.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    inactive: Literal["frozen", "dense"] = "frozen"

    def __post_init__(self) -> None:
        _check_range("lr", self.lr, 0.0, float("inf"))
        _check_range("momentum", self.momentum, 0.0, 1.0)
        _check_range("weight_decay", self.weight_decay, 0.0, float("inf"))
        if self.inactive not in ("frozen", "dense"):
            raise ValueError(f'inactive must be "frozen" or "dense", got {self.inactive!r}')

    @property
    def wide(self) -> tuple[str, ...]:
        """Moments [n, D]."""
        return ("momentum",) if self.momentum else ()

    @property
    def narrow(self) -> tuple[str, ...]:
        """Columns [n]."""
        return ()

    def step(self, wide: Columns, narrow: Columns, gradient: Tensor, lr: Tensor) -> tuple[Columns, Columns]:
        w = wide["weight"]
        direction = gradient + self.weight_decay * w if self.weight_decay else gradient
        if not self.momentum:
            return {"weight": w - lr * direction}, narrow
        m = self.momentum * wide["momentum"] + direction
        return {"weight": w - lr * m, "momentum": m}, narrow


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
