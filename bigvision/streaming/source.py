"""Where image rows come from: anything with a shape (C, H, W) that can be sliced by rows.

Legend: C channels, H rows, W columns of the scene; H', W' the same padded to the network's total stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class RowSource(Protocol):
    """A scene: a tensor, an array, a zarr array, a raster."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""

    def __getitem__(self, key: Any) -> Any:
        """`source[:, a:b]` gives rows a..b, [C, b - a, W]."""


@dataclass(frozen=True)
class ImageRows:
    """A scene read as the network's padded image: zeros below and on the right.

    Attributes:
        source: the scene.
        shape: (C, H, W) that it must have.
        padded: (H', W').
        dtype, device: of the rows handed out.
    """

    source: RowSource
    shape: tuple[int, int, int]
    padded: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if tuple(self.source.shape) != self.shape:
            raise ValueError(
                f"the source is {tuple(self.source.shape)}, the model was prepared for {self.shape}"
            )

    def read(self, a: int, b: int) -> Tensor:
        """Rows a..b of the padded image, [1, C, b - a, W'], channels last.

        Raises:
            ValueError: the source gave another number of rows or columns than it announced.
            RuntimeError: the source failed; the message names the rows.
        """
        channels, height, width = self.shape
        stop = min(b, height)
        rows = _tensor(self._slice(a, stop)) if a < stop else torch.zeros(channels, 0, width)
        if tuple(rows.shape) != (channels, max(stop - a, 0), width):
            raise ValueError(
                f"rows {a}..{stop} of the source are {tuple(rows.shape)}, "
                f"expected {(channels, max(stop - a, 0), width)}: did its shape change?"
            )
        rows = rows.to(self.device, self.dtype)[None]
        missing = (self.padded[1] - width, b - a - rows.shape[-2])
        rows = F.pad(rows, (0, missing[0], 0, missing[1])) if any(missing) else rows
        return rows.contiguous(memory_format=torch.channels_last)

    def _slice(self, a: int, b: int) -> Any:
        try:
            return self.source[:, a:b]
        except Exception as error:
            raise RuntimeError(f"reading rows {a}..{b} of the source failed: {error}") from error


def _tensor(rows: Any) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    array = np.asarray(rows)
    if array.dtype in (np.uint16, np.uint32):  # torch computes with neither
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))
