"""Where the truth comes from: labels that can be sliced by rows, cut to what the loss counts.

Legend: H, W rows and columns of the scene; K classes or channels of the network's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetRows:
    """The truth behind a network's output.

    Attributes:
        target: [H, W] or [K, H, W], sliceable by rows; for a network with one answer for the image, anything
            that makes an array.
        mask: [H, W], true (not 0) where a pixel counts; None: all do.
        size: (H, W); None where the network's output has no rows.
        device: of what is handed out.
    """

    target: Any
    mask: Any
    size: tuple[int, int] | None
    device: torch.device

    def __post_init__(self) -> None:
        if self.size is None:
            if self.mask is not None:
                raise ValueError("a mask needs a network whose output has rows and columns")
            return
        for name, value in (("target", self.target), ("mask", self.mask)):
            if value is None and name == "mask":
                continue
            shape = tuple(value.shape)
            if shape[-2:] != self.size or len(shape) not in ((2, 3) if name == "target" else (2,)):
                raise ValueError(f"the {name} is {shape}, the scene has {self.size} rows and columns")

    def whole(self) -> Tensor:
        """The image's own truth, with the batch axis: [1] or [1, K]."""
        value = _tensor(self.target, self.device)
        return value.reshape(1, *value.shape[value.ndim > 0 and value.shape[0] == 1 :])

    def select(self, y: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The outputs that count and their truth, for the output rows `y` [1, K, h, W] from `row` on.

        Without a mask y [1, K, h, W] and [1, h, W] or [1, K, h, W]; with one [1, K, n] and [1, n] or
        [1, K, n] of its n pixels.
        """
        stop = row + y.shape[-2]
        truth = self._rows(self.target, row, stop)[None]
        if self.mask is None:
            return y, truth
        counts = self._rows(self.mask, row, stop) != 0
        return y[:, :, counts], truth[..., counts]

    def _rows(self, source: Any, a: int, b: int) -> Tensor:
        assert self.size is not None
        try:
            rows = source[a:b] if len(source.shape) == 2 else source[:, a:b]
        except Exception as error:
            raise RuntimeError(f"reading rows {a}..{b} of the target failed: {error}") from error
        found = _tensor(rows, self.device)
        if found.shape[-2:] != (b - a, self.size[1]):
            raise ValueError(f"rows {a}..{b} of the target are {tuple(found.shape)}: did its shape change?")
        return found


def _tensor(value: Any, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch computes with none of them
            array = array.astype(np.int64)
        value = torch.from_numpy(np.ascontiguousarray(array))
    return value.to(device)
