"""Tiles of a raster: which window to write, which larger window to read for it.

Windows are rasterio's, in whole pixels: `row_off`, `col_off`, `height`, `width`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import overload

from rasterio.windows import Window

Pair = int | tuple[int, int]
Margins = int | tuple[int, int] | tuple[int, int, int, int]


@dataclass(frozen=True)
class Tile:
    """One piece of a raster: write `core`, read `padded`, and `crop` leads from one to the other.

    index: position in the grid's row-major order.
    core: the window this tile is responsible for.
    padded: the core with its halo, clipped at the raster's edge, starting at multiples of the grid's `align`.
    """

    index: int
    core: Window
    padded: Window

    @property
    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of an array over `padded` that belong to `core`: `array[..., *tile.crop]`."""
        top = self.core.row_off - self.padded.row_off
        left = self.core.col_off - self.padded.col_off
        return slice(top, top + self.core.height), slice(left, left + self.core.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the core."""
        return self.core.height, self.core.width

    def __str__(self) -> str:
        rows = f"rows {self.core.row_off}-{self.core.row_off + self.core.height}"
        return (
            f"tile {self.index} ({rows}, columns {self.core.col_off}-{self.core.col_off + self.core.width})"
        )


class TileGrid(Sequence[Tile]):
    """The tiles of a `height` x `width` raster, row by row; core windows partition it exactly.

    tile: size of a core window, an int or (height, width); (h, width) gives full-width bands of rows.
    halo: context around the core in pixels: an int, (rows, columns) or (top, bottom, left, right).
    align: padded windows start at multiples of this (a network's total stride), an int or (rows, columns);
        their ends are rounded up to multiples as well where the raster goes on. Any tile size will do.

    Raises ValueError for a negative size or halo and for a tile or alignment below 1.
    """

    def __init__(self, height: int, width: int, tile: Pair, halo: Margins = 0, align: Pair = 1) -> None:
        self.height, self.width = height, width
        self.tile = _pair(tile)
        self.halo = _margins(halo)
        self.align = _pair(align)
        if height < 0 or width < 0:
            raise ValueError(f"a raster can't be {height} x {width}")
        for name, value in (("tile", self.tile), ("align", self.align)):
            if min(value) < 1:
                raise ValueError(f"{name} must be at least 1 pixel, got {value[0]} x {value[1]}")
        if min(self.halo) < 0:
            raise ValueError(f"halo can't be negative, got {halo}")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.tile[0]), -(-self.width // self.tile[1])

    def __len__(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def at(self, row: int, column: int) -> Tile:
        """The tile in one row and column of the grid; IndexError outside of it."""
        rows, columns = self.shape
        if not (0 <= row < rows and 0 <= column < columns):
            raise IndexError(f"tile ({row}, {column}) of a grid of {rows} x {columns}")
        top, left = row * self.tile[0], column * self.tile[1]
        bottom, right = min(top + self.tile[0], self.height), min(left + self.tile[1], self.width)
        core = Window(left, top, right - left, bottom - top)
        padded = padded_window(core, (self.height, self.width), self.halo, self.align)
        return Tile(row * columns + column, core, padded)

    @overload
    def __getitem__(self, index: int) -> Tile: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tile]: ...
    def __getitem__(self, index: int | slice) -> Tile | list[Tile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"tile {index} of a grid of {len(self)}")
        return self.at(*divmod(index % len(self), self.shape[1]))

    def __iter__(self) -> Iterator[Tile]:
        return (self[i] for i in range(len(self)))

    def overlapping(self, window: Window) -> list[Tile]:
        """The tiles whose core shares a pixel with `window`, in row-major order."""
        top, left = max(0, window.row_off), max(0, window.col_off)
        bottom = min(self.height, window.row_off + window.height)
        right = min(self.width, window.col_off + window.width)
        if top >= bottom or left >= right:
            return []
        rows = range(top // self.tile[0], (bottom - 1) // self.tile[0] + 1)
        columns = range(left // self.tile[1], (right - 1) // self.tile[1] + 1)
        return [self.at(row, column) for row in rows for column in columns]

    @property
    def overhead(self) -> float:
        """Pixels read over pixels written, at least 1: what the halo and the alignment cost."""
        rows, columns = self.shape
        tall = sum(self.at(row, 0).padded.height for row in range(rows)) if columns else 0
        wide = sum(self.at(0, column).padded.width for column in range(columns)) if rows else 0
        return tall * wide / (self.height * self.width) if len(self) else 1.0

    def __repr__(self) -> str:
        return (
            f"TileGrid({self.height}, {self.width}, tile={self.tile}, halo={self.halo}, align={self.align}): "
            f"{self.shape[0]} x {self.shape[1]} tiles"
        )


def padded_window(core: Window, size: tuple[int, int], halo: Margins = 0, align: Pair = 1) -> Window:
    """What must be read of a raster of `size` (height, width) for a window of it: see `TileGrid`."""
    (above, below, before, after), (tall, wide) = _margins(halo), _pair(align)
    y0, y1 = _pad(core.row_off, core.row_off + core.height, above, below, tall, size[0])
    x0, x1 = _pad(core.col_off, core.col_off + core.width, before, after, wide, size[1])
    return Window(x0, y0, x1 - x0, y1 - y0)


def shard_aligned(
    height: int, width: int, shard: Pair, tile: Pair | None = None, halo: Margins = 0, align: Pair = 1
) -> TileGrid:
    """A `TileGrid` whose core windows never share a shard: `tile` rounded up to multiples of `shard`.

    A tile that spans the raster's width or height already needs no rounding there.
    """
    shard = _pair(shard)
    wanted = _pair(tile if tile is not None else shard)
    rounded = tuple(-(-w // s) * s for w, s in zip(wanted, shard, strict=True))
    return TileGrid(height, width, (rounded[0], rounded[1]), halo, align)


def common_align(*strides: int) -> int:
    """The least alignment that suits every stride: their least common multiple."""
    return lcm(*strides)


def _pad(start: int, stop: int, before: int, after: int, align: int, size: int) -> tuple[int, int]:
    begin = max(0, (start - before) // align * align)
    return begin, min(size, -(-(stop + after) // align) * align)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _margins(value: Margins) -> tuple[int, int, int, int]:
    if isinstance(value, int):
        return value, value, value, value
    if len(value) == 2:
        return value[0], value[0], value[1], value[1]
    return value
