"""Rows that were left out for some steps, brought to where dense SGD would have taken them.

Without a gradient a step of SGD is linear in (w, m): m' = mu*m + wd*w and w' = w - lr*m', that is

    [w']   [1 - lr*wd   -lr*mu] [w]
    [m'] = [wd           mu   ] [m]

A row last touched before step a and next at step b needs the product of steps a ... b-1, each with its own
learning rate. Inverting prefix products would lose all digits (the matrices contract), so the products of
aligned blocks of 2^j steps are kept as a tree and each range is put together from O(log) of them.

Legend: S steps so far, N ranges, K rows, D dimension. Everything here is float64.
"""

import torch
from torch import Tensor


class StepHistory:
    """The learning rates of all steps so far, and the tree of their 2 x 2 products."""

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self._levels: list[list[Tensor]] = [[]]  # level j: products of blocks of 2^j steps
        self.rates: list[float] = []

    def __len__(self) -> int:
        return len(self.rates)

    def append(self, lr: float) -> None:
        """One more step, taken with `lr`."""
        wd, mu = self.weight_decay, self.momentum
        self.rates.append(lr)
        product = torch.tensor([[1.0 - lr * wd, -lr * mu], [wd, mu]], dtype=torch.float64)
        for level in self._levels:
            level.append(product)
            if len(level) % 2:
                return
            product = level[-1] @ level[-2]
        self._levels.append([product])

    def replay(self, rates: list[float]) -> None:
        """Starts over with these learning rates."""
        self._levels, self.rates = [[]], []
        for lr in rates:
            self.append(lr)

    def products_until_now(self, start: Tensor) -> Tensor:
        """For each range [start, S), start int64 [N] on the CPU: the product of its steps, [N, 2, 2]."""
        place, end = start.clone(), len(self)
        out = torch.eye(2, dtype=torch.float64).expand(len(start), 2, 2).clone()
        climbing = [(j, True) for j in range(len(self._levels))]
        for j, up in climbing + [(j, False) for j in reversed(range(len(self._levels)))]:
            fits = place + (1 << j) <= end
            if up:  # blocks must be aligned: first those that lead to the next larger block
                fits &= (place >> j) & 1 == 1
            if fits.any():
                blocks, which = (place[fits] >> j).unique(return_inverse=True)
                level = torch.stack([self._levels[j][b] for b in blocks.tolist()])
                out[fits] = level[which] @ out[fits]
                place[fits] += 1 << j
        return out


def bring_up(history: StepHistory, last: Tensor, w: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows w [K, D] (and momentum m), last touched before step `last` (int [K]), as of now; acc."""
    starts, which = last.to("cpu", torch.int64).unique(return_inverse=True)
    products = history.products_until_now(starts).to(w.device, w.dtype)[which.to(w.device)]
    a, b, c, d = (products[:, i, j, None] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    if m is None:
        return a * w, None
    return a * w + b * m, c * w + d * m
