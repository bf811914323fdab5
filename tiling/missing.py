"""How a copy tells the pixels that have no data: by a value that no other pixel has, or by a mask."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tiling.errors import RasterError
from tiling.grid import TileGrid
from tiling.raster import Raster
from tiling.source import Array, holds

_BLOCK = 2**24
Convert = Callable[[Array, np.dtype[Any]], Array]


def common_value(raster: Raster) -> float | None:
    """A value that a copy's missing pixels may take without one more look: the raster's nodata, or NaN.

    None where there is no such value, or where all bands miss the same pixels, so that a mask is as good.
    """
    if raster.nodata is not None:
        return raster.nodata
    floating = np.issubdtype(raster.dtype, np.floating)
    return float("nan") if floating and raster.has_mask and not raster.shares_mask else None


class Values:
    """Values seen among the valid pixels of a raster, and whether any pixel is missing."""

    def __init__(self, dtype: np.dtype[Any], wished: tuple[float | None, ...]) -> None:
        self.dtype, self.missing = dtype, False
        self.small = dtype.kind in "iu" and dtype.itemsize <= 2
        self.seen = np.zeros(2 ** (8 * dtype.itemsize) if self.small else 0, bool)
        first = [value for value in wished if value is not None and holds(dtype, value)]
        if dtype.kind == "f":
            self.candidates: list[Any] = [*first, float("nan")]
        elif dtype.kind == "b":
            self.candidates = []
        else:
            low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
            more = range(low, high + 1) if self.small else (*range(low, low + 8), *range(high, high - 8, -1))
            self.candidates = [*first, 0, high, low, *more]

    def look(self, data: Array, valid: Array) -> None:
        """Take note of some pixels."""
        self.missing |= not valid.all()
        pixels = data[valid]
        if self.small:
            self.seen[pixels.view(f"u{self.dtype.itemsize}")] = True
        else:
            self.candidates = [value for value in self.candidates if not (pixels == value).any()]

    def free(self) -> Any:
        """A value that no valid pixel has; None where there is none."""
        if not self.small:
            return self.candidates[0] if self.candidates else None
        unsigned = np.asarray(self.candidates).astype(np.int64) % len(self.seen)
        found = np.flatnonzero(~self.seen[unsigned])
        return self.candidates[found[0]] if found.size else None


def value_for(raster: Raster, dtype: np.dtype[Any], convert: Convert) -> float | None:
    """The nodata value of a file that has one for all bands and one mask: where it needs one, a free one.

    None where nothing is missing, or where the mask of all bands tells it.
    Raises RasterError where bands miss different pixels and every value of `dtype` is in use.
    """
    value = common_value(raster)
    loses_nan = np.issubdtype(raster.dtype, np.floating) and not np.issubdtype(dtype, np.floating)
    told = raster.shares_mask or not raster.has_mask
    if value is not None and (holds(dtype, value) or raster.nodata is not None):
        return value
    if value is None and told and not loses_nan:
        return None
    values = look_through(raster, dtype, convert)
    if not values.missing:
        return None
    free = values.free()
    if free is None:
        raise RasterError(
            f"{raster.name}: bands miss different pixels and every {dtype} value is in use: a file has none "
            "left to mean nodata; give a wider dtype, or write a zarr store"
        )
    return float(free) if isinstance(free, float) else int(free)


def look_through(raster: Raster, dtype: np.dtype[Any], convert: Convert) -> Values:
    """Every pixel of `raster`, made `dtype` by `convert`, looked at once."""
    values = Values(dtype, raster.profile.band_nodata)
    rows = max(1, _BLOCK // max(1, raster.width * raster.shape[0]))
    rows = max(1, rows // raster.block_shape[0]) * raster.block_shape[0]
    for tile in TileGrid(raster.height, raster.width, (min(rows, raster.height), raster.width)):
        pixels = np.ma.asarray(raster.read(tile.core, masked=True))
        values.look(convert(pixels.data, dtype), ~np.ma.getmaskarray(pixels))
    return values
