"""Overlapping tiles merged by weights, for models that no halo makes exact.

Each pixel of the result is the mean of all tiles over it, weighted by a window that fades towards a tile's
edge but never reaches zero: every pixel of the raster is covered with a weight above zero, also at its edges.

Shapes: B bands, H and W rows and columns of the raster, h and w of a tile's padded window.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling.grid import Tile, TileGrid
from tiling.source import Array

Weights = NDArray[np.float32]
WINDOWS = ("hann", "pyramid", "gaussian")


def window_weights(shape: tuple[int, int], kind: str = "hann") -> Weights:
    """Weights [h, w] of a tile's pixels, separable, highest in the middle, above zero everywhere.

    Sampled at pixel centres t = (i + 1/2) / n of each side:
    "hann": sin^2(pi t). "pyramid": 1 - |2 t - 1|. "gaussian": exp(-((2 t - 1) / 0.5)^2 / 2), so that an
    edge's middle weighs 0.135. Raises ValueError for another kind or an empty shape.
    """
    if kind not in WINDOWS:
        raise ValueError(f"window {kind!r} is none of {', '.join(WINDOWS)}")
    if min(shape) < 1:
        raise ValueError(f"a window needs at least one pixel, got {shape[0]} x {shape[1]}")
    sides = [_profile(size, kind) for size in shape]
    return np.outer(*sides).astype(np.float32)


def _profile(size: int, kind: str) -> NDArray[np.float64]:
    """Centres, not ends, are sampled: that keeps the first and last weight of any size above zero."""
    centre = (np.arange(size) + 0.5) / size
    if kind == "hann":
        return np.sin(np.pi * centre) ** 2
    if kind == "pyramid":
        return 1 - np.abs(2 * centre - 1)
    return np.exp(-(((2 * centre - 1) / 0.5) ** 2) / 2)


def blend_rows(
    results: Iterable[tuple[Tile, Array]], grid: TileGrid, *, kind: str = "hann"
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Merge tiles that come in the grid's order, holding only the rows that later tiles still reach.

    results: (tile, pixels [B, h, w] over its padded window), one for every tile of `grid`, in its order.
    Yields (full-width window, float32 pixels [B, rows, W]) from top to bottom, as soon as rows are complete.
    Memory: about two rows of tiles. Raises ValueError for a tile out of turn or of the wrong shape.
    """
    rows = _Rows(grid, kind)
    for expected, (tile, data) in zip(grid, results, strict=True):
        if tile.index != expected.index:
            raise ValueError(f"{tile} came where {expected} was due; blend_rows takes tiles in order")
        rows.add(tile, data)
        if (tile.index + 1) % grid.shape[1] == 0:
            yield from rows.flush(_first_needed_row(grid, tile.index + 1))


class _Rows:
    """Sums of weighted pixels and of weights for the rows from `top` on."""

    def __init__(self, grid: TileGrid, kind: str) -> None:
        self.grid, self.kind, self.top = grid, kind, 0
        self.total: NDArray[np.float32] | None = None
        self.weight = np.zeros((0, grid.width), np.float32)

    def add(self, tile: Tile, data: Array) -> None:
        weights = _tile_weights(tile, data, self.kind)
        bottom = tile.padded.row_off + tile.padded.height
        self._grow(data.shape[0], bottom - self.top)
        assert self.total is not None
        rows = slice(tile.padded.row_off - self.top, bottom - self.top)
        columns = tile.padded.toslices()[1]
        self.total[:, rows, columns] += data * weights
        self.weight[rows, columns] += weights

    def flush(self, until: int) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        assert self.total is not None
        count = until - self.top
        if count > 0:
            window = Window(0, self.top, self.grid.width, count)
            yield window, self.total[:, :count] / self.weight[:count]
            self.total, self.weight, self.top = self.total[:, count:], self.weight[count:], until

    def _grow(self, bands: int, height: int) -> None:
        old = self.weight.shape[0]
        if self.total is None:
            self.total = np.zeros((bands, old, self.grid.width), np.float32)
        if height > old:
            more = height - old
            self.total = np.pad(self.total, ((0, 0), (0, more), (0, 0)))
            self.weight = np.pad(self.weight, ((0, more), (0, 0)))


def _first_needed_row(grid: TileGrid, index: int) -> int:
    """The first row that tiles from `index` on still add to."""
    return int(grid[index].padded.row_off) if index < len(grid) else grid.height


class Blender:
    """Merges tiles that come in any order and from any thread; its sums lie on disk, not in memory.

    The sums of weighted pixels [B, H, W] and of weights [H, W] are float32 zarr arrays in `scratch`, a folder
    that must not exist and that `close` removes. One process fills it; tiles are added one at a time.
    """

    def __init__(
        self,
        bands: int,
        height: int,
        width: int,
        scratch: str | PathLike[str],
        *,
        kind: str = "hann",
        chunk: int = 512,
    ) -> None:
        import threading

        import zarr

        self.shape, self.kind, self.scratch = (bands, height, width), kind, Path(scratch)
        if self.scratch.exists():
            raise ValueError(f"{self.scratch}: exists already; the sums need a folder of their own")
        window_weights((1, 1), kind)
        group = zarr.create_group(self.scratch)
        options: dict[str, Any] = {"dtype": "float32", "fill_value": 0, "compressors": None}
        size = (min(chunk, height), min(chunk, width))
        self.total = group.create_array("total", shape=self.shape, chunks=(bands, *size), **options)
        self.weight = group.create_array("weight", shape=(height, width), chunks=size, **options)
        self.lock = threading.Lock()

    def add(self, tile: Tile, data: Array) -> None:
        """Add pixels [B, h, w] over a tile's padded window, weighted by the window function."""
        weights = _tile_weights(tile, data, self.kind)
        rows, columns = tile.padded.toslices()
        with self.lock:
            self.total[:, rows, columns] = np.asarray(self.total[:, rows, columns]) + data * weights
            self.weight[rows, columns] = np.asarray(self.weight[rows, columns]) + weights

    def read(self, window: Window) -> NDArray[np.float32]:
        """The weighted mean [B, h, w] of what was added so far; NaN where nothing was."""
        rows, columns = window.toslices()
        weight = np.asarray(self.weight[rows, columns])
        with np.errstate(invalid="ignore"):
            mean: NDArray[np.float32] = np.asarray(self.total[:, rows, columns]) / weight
        return mean

    def finish(
        self,
        destination: Any,
        *,
        convert: Callable[[NDArray[np.float32]], Array] | None = None,
    ) -> None:
        """Write the means to a `ZarrWriter`, shard by shard; `convert` may take the argmax first.

        Raises ValueError where no tile was added over a pixel: it has no mean.
        """
        for tile in destination.grid():
            bare = int((np.asarray(self.weight[tile.core.toslices()]) == 0).sum())
            if bare:
                raise ValueError(f"{tile}: {bare} pixels that no added tile covers")
            mean = self.read(tile.core)
            destination.write(convert(mean) if convert else mean, tile.core)

    def close(self) -> None:
        """Remove the sums."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self) -> Blender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tile_weights(tile: Tile, data: Array, kind: str) -> Weights:
    size = (tile.padded.height, tile.padded.width)
    if data.ndim != 3 or data.shape[1:] != size:
        raise ValueError(f"{tile} has a padded window of {size[0]} x {size[1]} pixels, got {data.shape}")
    return window_weights(size, kind)
