"""The optimisers, one tile of rows at a time: pure functions of a tile whose gradient is complete.

Legend: K rows, D dimension. Wide columns ("weight" and moments) are acc [K, D]; narrow ones [K].
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Columns = dict[str, Tensor]


class RowOptimizer(Protocol):
    """Settings of an optimiser fused into backward; the learning rate is the first one."""

    @property
    def lr(self) -> float:
        """Initial learning rate."""
        ...

    @property
    def wide(self) -> tuple[str, ...]:
        """Names of the moments [n, D], in the centres' dtype."""
        ...

    @property
    def narrow(self) -> dict[str, torch.dtype | None]:
        """Names and dtypes of the columns [n] (None: the accumulation dtype); they start at 0."""
        ...

    @property
    def dense(self) -> bool:
        """Whether idle rows follow what a dense optimiser would have done to them."""
        ...

    def step(self, wide: Columns, narrow: Columns, gradient: Tensor, lr: Tensor) -> tuple[Columns, Columns]:
        """New wide and narrow columns of a tile from gradient acc [K, D] and lr, an acc scalar."""
        ...


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: d = g + weight_decay*w, m = momentum*m + d, w -= lr*m.

    `inactive` says what happens to classes that the gate leaves out. "frozen": they and their momentum
    stay bit-identical. "dense": they move as they would have with a zero gradient, caught up when next
    touched (exactly in float32 and float64, in expectation in bfloat16).
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    inactive: Literal["frozen", "dense"] = "frozen"

    def __post_init__(self) -> None:
        _check_range("lr", self.lr)
        _check_range("momentum", self.momentum, 1.0)
        _check_range("weight_decay", self.weight_decay)
        _check_inactive(self.inactive)

    @property
    def wide(self) -> tuple[str, ...]:
        """Momentum, where there is any."""
        return ("momentum",) if self.momentum else ()

    @property
    def narrow(self) -> dict[str, torch.dtype | None]:
        """Nothing."""
        return {}

    @property
    def dense(self) -> bool:
        """Whether there is anything that would move an idle row, and it is asked for."""
        return self.inactive == "dense" and (self.momentum > 0 or self.weight_decay > 0)

    def step(self, wide: Columns, narrow: Columns, gradient: Tensor, lr: Tensor) -> tuple[Columns, Columns]:
        """See `RowOptimizer.step`."""
        w = wide["weight"]
        direction = gradient + self.weight_decay * w if self.weight_decay else gradient
        if not self.momentum:
            return {"weight": w - lr * direction}, narrow
        m = self.momentum * wide["momentum"] + direction
        return {"weight": w - lr * m, "momentum": m}, narrow


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one accumulator a row: a += mean_D(g^2), w -= lr*(g / (sqrt(a) + eps) + weight_decay*w).

    The optimiser of huge embeddings (Naumov et al. 2019, arXiv:1906.00091, and its row-wise form in
    FBGEMM): D times less state than Adagrad, and no momentum to hold. Weight decay is decoupled.
    """

    lr: float
    eps: float = 1e-10
    weight_decay: float = 0.0
    inactive: Literal["frozen"] = "frozen"

    def __post_init__(self) -> None:
        _check_range("lr", self.lr)
        _check_range("eps", self.eps)
        _check_range("weight_decay", self.weight_decay)
        _refuse_dense("RowwiseAdagrad", self.inactive)

    @property
    def wide(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def narrow(self) -> dict[str, torch.dtype | None]:
        """The accumulator of squared gradients."""
        return {"accumulator": None}

    @property
    def dense(self) -> bool:
        """Never."""
        return False

    def step(self, wide: Columns, narrow: Columns, gradient: Tensor, lr: Tensor) -> tuple[Columns, Columns]:
        """See `RowOptimizer.step`."""
        accumulator = narrow["accumulator"] + (gradient * gradient).mean(1)
        rate = (lr / (torch.sqrt(accumulator) + self.eps))[:, None]
        w = wide["weight"]
        kept = w * (1.0 - lr * self.weight_decay) if self.weight_decay else w
        return {"weight": kept - rate * gradient}, {"accumulator": accumulator}


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with decoupled weight decay, as torch.optim.AdamW.

    The bias correction counts the steps of each row, so a row first touched at step 10 000 starts like
    one touched at step 1. Idle rows stay bit-identical: Adam is nonlinear in its gradient's history and
    has no closed form to catch up with, so `inactive="dense"` is refused.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    inactive: Literal["frozen"] = "frozen"

    def __post_init__(self) -> None:
        _check_range("lr", self.lr)
        for beta in self.betas:
            _check_range("betas", beta, 1.0)
        _check_range("eps", self.eps)
        _check_range("weight_decay", self.weight_decay)
        _refuse_dense("Adam", self.inactive)

    @property
    def wide(self) -> tuple[str, ...]:
        """First and second moments."""
        return ("first_moment", "second_moment")

    @property
    def narrow(self) -> dict[str, torch.dtype | None]:
        """Steps of each row."""
        return {"count": torch.int32}

    @property
    def dense(self) -> bool:
        """Never."""
        return False

    def step(self, wide: Columns, narrow: Columns, gradient: Tensor, lr: Tensor) -> tuple[Columns, Columns]:
        """See `RowOptimizer.step`."""
        first_beta, second_beta = self.betas
        count = narrow["count"] + 1
        first = first_beta * wide["first_moment"] + (1.0 - first_beta) * gradient
        second = second_beta * wide["second_moment"] + (1.0 - second_beta) * gradient * gradient
        steps = count.to(gradient.dtype)[:, None]
        first_hat = first / (1.0 - first_beta**steps)
        second_hat = second / (1.0 - second_beta**steps)
        w = wide["weight"]
        kept = w * (1.0 - lr * self.weight_decay) if self.weight_decay else w
        new = kept - lr * first_hat / (torch.sqrt(second_hat) + self.eps)
        return {"weight": new, "first_moment": first, "second_moment": second}, {"count": count}


class FusedSteps(torch.optim.Optimizer):
    """What learning-rate schedulers hold: its `param_groups[0]["lr"]` is the rate of the next backward.

    The step itself happens inside backward, so `step()` does nothing; calling it keeps schedulers quiet.
    """

    def __init__(self, anchor: Tensor, lr: float) -> None:
        super().__init__([anchor], {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        """Nothing to do: backward has updated the centres. Returns closure(), if given."""
        return None if closure is None else closure()


def _check_range(name: str, value: float, below: float = float("inf")) -> None:
    if not 0.0 <= value < below:
        raise ValueError(f"{name} must be in [0, {below}), got {value}")


def _check_inactive(value: str) -> None:
    if value not in ("frozen", "dense"):
        raise ValueError(f'inactive must be "frozen" or "dense", got {value!r}')


def _refuse_dense(name: str, value: str) -> None:
    _check_inactive(value)
    if value == "dense":
        raise ValueError(f'{name} is nonlinear: idle rows can\'t be caught up, use inactive="frozen" or SGD')
