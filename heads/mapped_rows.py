"""Columns in memory-mapped files, larger than the memory of the machine.

The kernel's page cache is the cache. Rows that will be wanted are announced in runs, so that the disk reads
sequentially and ahead; a tile's pages leave the process's resident set as soon as the tile is done (they stay
in the page cache as long as there is room).

Legend: n classes of this shard, K rows of a tile, D dimension.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from heads.stores import Rows, gather, scatter

# Two runs with a gap up to this many bytes are read as one: a disk reads them faster than it seeks.
_GAP = 1 << 16


class MappedRows:
    """A `RowStore` in files `folder/NAME-RANK-of-SIZE.rows`, the bare rows of one shard each.

    The files are working memory, not a checkpoint: they are created anew, and what they hold after a crash is
    unknown. Raises ValueError where the folder's disk has no room for them.
    """

    prefetches = True

    def __init__(
        self,
        names: Sequence[str],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        folder: Path,
        rank: int,
        size: int,
    ) -> None:
        self.names = tuple(names)
        self._device = device
        self._row_bytes = shape[1] * dtype.itemsize
        check_room(folder, shape[0] * self._row_bytes * len(names), rank)
        paths = {name: folder / f"{name}-{rank}-of-{size}.rows" for name in names}
        total = max(shape[0] * self._row_bytes, 1)
        for path in paths.values():
            path.unlink(missing_ok=True)
        self._maps = {name: _map(path, total) for name, path in paths.items()}
        self._columns = {
            name: torch.frombuffer(view, dtype=dtype, count=shape[0] * shape[1]).view(shape)
            if shape[0]
            else torch.empty(shape, dtype=dtype)
            for name, view in self._maps.items()
        }
        self._spare: dict[str, Tensor] = {}
        self._viewed: slice | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._reading: Future[None] | None = None

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """See `RowStore.load`."""
        if self._viewed is not None:
            self._release(self._viewed, self.names)
            self._viewed = None
        if isinstance(rows, slice):
            self._viewed = rows
            return {name: self._columns[name][rows].to(self._device) for name in names}
        tiles = {n: gather(self._columns[n], rows.to("cpu"), self._spare, n).to(self._device) for n in names}
        self._release(rows, names)
        return tiles

    def store(self, rows: Rows, values: Mapping[str, Tensor]) -> None:
        """See `RowStore.store`."""
        for name, value in values.items():
            scatter(self._columns[name], rows if isinstance(rows, slice) else rows.to("cpu"), value.to("cpu"))
        self._release(rows, list(values))

    def prefetch(self, rows: Rows) -> None:
        """Asks the kernel, from a thread, to read the rows of all columns ahead, run by run."""
        if self._reading is None or self._reading.done():
            self._reading = self._reader.submit(self._read_ahead, rows)

    def _read_ahead(self, rows: Rows) -> None:
        for start, stop in _runs(rows, max(1, _GAP // self._row_bytes)):
            for view in self._maps.values():
                _advise(view, mmap.MADV_WILLNEED, start * self._row_bytes, stop * self._row_bytes)

    def _release(self, rows: Rows, names: Sequence[str]) -> None:
        """Takes the pages of a finished tile out of the resident set."""
        first, stop = (rows.start, rows.stop) if isinstance(rows, slice) else _span(rows)
        for name in names:
            _advise(self._maps[name], mmap.MADV_DONTNEED, first * self._row_bytes, stop * self._row_bytes)

    def whole(self, name: str) -> Tensor:
        """See `RowStore.whole`."""
        return self._columns[name]

    def reload(self) -> None:
        """Nothing to do: the files are the rows."""

    def to(self, device: torch.device) -> None:
        """See `RowStore.to`."""
        self._device = device


def _map(path: Path, size: int) -> mmap.mmap:
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would kill the process
        return mmap.mmap(file.fileno(), size)


def check_room(folder: Path, wanted: int, rank: int) -> None:
    """Makes the folder; raises ValueError where its disk lacks `wanted` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if wanted > free:
        raise ValueError(
            f"rank {rank}: the memory-mapped centres need {wanted:,} bytes in {folder}, "
            f"which has {free:,} free"
        )


def _span(rows: Tensor) -> tuple[int, int]:
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def _runs(rows: Rows, gap: int) -> list[tuple[int, int]]:
    """[start, stop) of the stretches of sorted rows whose gaps are at most `gap` rows."""
    if isinstance(rows, slice):
        return [(rows.start, rows.stop)]
    if not len(rows):
        return []
    breaks = (rows.diff() > gap).nonzero()[:, 0]
    starts = torch.cat([rows[:1], rows[breaks + 1]])
    stops = torch.cat([rows[breaks], rows[-1:]]) + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _advise(view: mmap.mmap, advice: int, start: int, stop: int) -> None:
    page = mmap.PAGESIZE
    low = start // page * page
    if stop > low:
        view.madvise(advice, low, min(stop, len(view)) - low)
