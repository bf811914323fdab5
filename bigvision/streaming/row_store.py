"""Rows that a pass reads instead of computing them: the image's, and those that an earlier pass kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, fx

from bigvision.streaming.program import Stage
from bigvision.streaming.source import ImageRows


@dataclass(frozen=True)
class GivenRows:
    """The image's rows from its source, other stages' from and to a store.

    Attributes:
        node: the image's, in the graph.
        image: the image.
        store: of the other stages; None where there are none.
    """

    node: fx.Node
    image: ImageRows
    store: RowStore | None = None

    def read(self, stage: Stage, a: int, b: int) -> Tensor:
        """Rows a..b of a stage that is given."""
        if stage.node is self.node:
            return self.image.read(a, b)
        assert self.store is not None
        return self.store.read(stage, a, b)

    def keep(self, stage: Stage, rows: Tensor) -> None:
        """The following rows of a stage that later passes start from."""
        assert self.store is not None
        self.store.keep(stage, rows)


class RowStore:
    """Rows of some stages, written in order by one pass and read by later ones.

    One file of raw bytes a stage, in a folder of its own that is removed with the store.

    Args:
        folder: where that folder is made.
        device: of the rows that are read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._parent, self._device = folder, device
        self._files: dict[fx.Node, BinaryIO] = {}
        self._dtypes: dict[fx.Node, torch.dtype] = {}

    def __enter__(self) -> RowStore:
        self._parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="rows-", dir=self._parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.retain(frozenset())
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, stage: Stage, rows: Tensor) -> None:
        """Append the following rows of a stage."""
        if stage.node not in self._files:
            self._files[stage.node] = self._path(stage.node).open("w+b", buffering=0)
            self._dtypes[stage.node] = rows.dtype
        flat = rows.permute(_rows_first(stage)).contiguous().cpu()
        self._files[stage.node].write(flat.flatten().view(torch.uint8).numpy().data)

    def read(self, stage: Stage, a: int, b: int) -> Tensor:
        """Rows a..b of a stage."""
        dtype, order = self._dtypes[stage.node], _rows_first(stage)
        shape = list(stage.shape)
        shape[stage.axis] = b - a
        count = int(np.prod(shape)) * dtype.itemsize
        file = self._files[stage.node]
        file.seek(a * (count // max(b - a, 1)))
        flat = torch.from_numpy(np.fromfile(file, np.uint8, count)).view(dtype)
        rows = flat.reshape([shape[axis] for axis in order])
        return rows.permute([order.index(axis) for axis in range(len(order))]).to(self._device)

    def retain(self, nodes: Set[fx.Node]) -> None:
        """Delete the rows of all other stages."""
        for node in self._files.keys() - nodes:
            self._files.pop(node).close()
            self._path(node).unlink()

    def _path(self, node: fx.Node) -> Path:
        return self._folder / f"{node.name}.rows"


def _rows_first(stage: Stage) -> list[int]:
    """The order of axes on disk: rows first, and channels last as they lie in memory."""
    axes = list(range(len(stage.shape)))
    rows = axes[stage.axis]
    if len(axes) == 4 and rows == 2:
        return [2, 0, 3, 1]
    return [rows, *(axis for axis in axes if axis != rows)]
