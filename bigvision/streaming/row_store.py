"""Rows that a pass reads instead of computing them: the image's, and those that an earlier pass kept."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from bigvision.streaming.footprint import row_bytes, row_dtype
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

    def keep(self, stage: Stage, a: int, rows: Tensor) -> None:
        """Rows of a stage, from its row `a` on, that later passes start from."""
        assert self.store is not None
        self.store.keep(stage, a, rows)


@dataclass(frozen=True)
class RowStore:
    """Rows of some stages in a folder, one file of raw bytes a stage; processes may share it.

    Attributes:
        folder: where the files are.
        dtype: that rows are computed in.
        device: of the rows that are read.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device

    def keep(self, stage: Stage, a: int, rows: Tensor) -> None:
        """Write rows of a stage at the place of its row `a`."""
        flat = rows.to(row_dtype(stage, self.dtype)).permute(_rows_first(stage)).contiguous().cpu()
        # Other processes write other rows of the same file.
        with os.fdopen(os.open(self._path(stage.node), os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            file.seek(a * row_bytes(stage, self.dtype))
            file.write(flat.flatten().view(torch.uint8).numpy().data)

    def read(self, stage: Stage, a: int, b: int) -> Tensor:
        """Rows a..b of a stage."""
        size, order = row_bytes(stage, self.dtype), _rows_first(stage)
        shape = list(stage.shape)
        shape[stage.axis] = b - a
        flat = np.fromfile(self._path(stage.node), np.uint8, (b - a) * size, offset=a * size)
        dtype = row_dtype(stage, self.dtype)
        assert flat.size == math.prod(shape) * dtype.itemsize
        rows = torch.from_numpy(flat).view(dtype).reshape([shape[axis] for axis in order])
        return rows.permute([order.index(axis) for axis in range(len(order))]).to(self.device)

    def retain(self, nodes: Set[fx.Node]) -> None:
        """Delete the rows of all other stages."""
        wanted = {self._path(node) for node in nodes}
        for path in self.folder.glob("*.rows"):
            if path not in wanted:
                path.unlink()

    def _path(self, node: fx.Node) -> Path:
        return self.folder / f"{node.name}.rows"


@contextmanager
def temporary_rows(parent: Path, dtype: torch.dtype, device: torch.device) -> Iterator[RowStore]:
    """A store in a folder of its own inside `parent`, which is removed at the end, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=parent))
    try:
        yield RowStore(folder, dtype, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rows_first(stage: Stage) -> list[int]:
    """The order of axes on disk: rows first, and channels last as they lie in memory."""
    axes = list(range(len(stage.shape)))
    rows = axes[stage.axis]
    if len(axes) == 4 and rows == 2:
        return [2, 0, 3, 1]
    return [rows, *(axis for axis in axes if axis != rows)]
