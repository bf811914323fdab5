"""Whether two rasters of one place share a pixel grid, and by how much they are shifted if not."""

from math import ceil, floor

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import Resampling, reproject, transform
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from tiling import Raster

_WHOLE = 1e-6  # of a pixel: rounding of coordinates in files
_ANY_CRS = CRS.from_epsg(3857)  # warping needs some CRS on both sides

_MARGIN = 2  # pixels: of bilinear and nearest resampling
_Axis = NDArray[np.float64]  # coordinates of points along one axis


class GridError(ValueError):
    """Rasters whose pixels don't lie on each other; the message says by how much they are shifted."""


def grid_shift(previous: Raster, current: Raster) -> tuple[float, float]:
    """Columns and rows that the previous raster's origin lies to the right of and below the current one's.

    Raises:
        GridError: another CRS, pixel size or rotation, where no shift tells the difference.
    """
    if previous.crs != current.crs:
        raise GridError(f"{previous.name} is in {previous.crs}, {current.name} in {current.crs}")
    a, b = previous.transform, current.transform
    if not np.allclose((a.a, a.b, a.d, a.e), (b.a, b.b, b.d, b.e), rtol=1e-9, atol=0):
        raise GridError(
            f"{previous.name} has pixels of {a.a:g} x {a.e:g}, {current.name} of {b.a:g} x {b.e:g} "
            f"(rotation {a.b:g}, {a.d:g} and {b.b:g}, {b.d:g})"
        )
    cols, rows = ~b @ (a.c, a.f)
    return float(cols), float(rows)


def check_same_grid(previous: Raster, current: Raster) -> None:
    """Refuse rasters that differ in CRS, pixel size, shift or size.

    Raises:
        GridError: naming the shift in pixels and in units of the CRS.
    """
    cols, rows = grid_shift(previous, current)
    if max(abs(cols), abs(rows)) > _WHOLE:
        a, b = previous.transform, current.transform
        raise GridError(
            f"{previous.name} is shifted against {current.name} by {cols:g} columns and {rows:g} rows "
            f"({a.c - b.c:g} and {a.f - b.f:g} in units of the CRS)"
        )
    if previous.shape[1:] != current.shape[1:]:
        raise GridError(
            f"{previous.name} is {previous.height} x {previous.width} pixels, "
            f"{current.name} {current.height} x {current.width}"
        )


def resampled(
    raster: Raster, like: Raster, window: Window, *, method: str = "bilinear"
) -> NDArray[np.generic]:
    """Pixels [B, h, w] of `raster` on the grid of `like`, over a window of that; 0 or nodata beyond it.

    The CRS may be another: GDAL's transformation is then right to an eighth of a pixel. Only the part under
    the window is read.
    """
    fill = raster.nodata if raster.nodata is not None else 0
    part = under(raster, like, window)
    if part is None:
        return np.full((raster.shape[0], window.height, window.width), fill, raster.dtype)
    return brought(raster.read(part), part, raster, like, window, nodata=raster.nodata, method=method)


def under(raster: Raster, like: Raster, window: Window) -> Window | None:
    """The part of `raster` from which a window of `like`, of any extent, is resampled; None where none is.

    Raises:
        GridError: one of them has no CRS, or no way leads from one CRS to the other.
    """
    xs, ys = _border(window, like.transform)
    if (raster.crs is None) != (like.crs is None):
        raise GridError(f"{raster.name} is in {raster.crs}, {like.name} in {like.crs}")
    if raster.crs != like.crs:
        try:
            xs, ys = (np.asarray(axis) for axis in transform(like.crs, raster.crs, xs, ys)[:2])
        except RasterioError as error:
            raise GridError(f"nothing leads from {like.crs} to {raster.crs}: {error}") from error
    cols, rows = _placed(~raster.transform, xs, ys)
    if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
        return None  # beyond where the raster's CRS is defined
    left, right = _span(cols, raster.width)
    top, bottom = _span(rows, raster.height)
    return Window(left, top, right - left, bottom - top) if left < right and top < bottom else None


def _span(places: _Axis, size: int) -> tuple[int, int]:
    """First pixel and the one after the last that hold the places and a kernel around them."""
    return max(floor(places.min()) - _MARGIN, 0), min(ceil(places.max()) + _MARGIN, size)


def brought(
    pixels: NDArray[np.generic],
    part: Window,
    raster: Raster,
    like: Raster,
    window: Window,
    *,
    nodata: float | None,
    method: str,
) -> NDArray[np.generic]:
    """`pixels` [B, h', w'], of a part of `raster`, on the grid of `like` over a window of that: [B, h, w].

    Where there are none they become `nodata`, or 0.
    """
    fill = 0 if nodata is None else nodata
    result = np.full((pixels.shape[0], window.height, window.width), fill, pixels.dtype)
    reproject(
        pixels,
        result,
        src_transform=window_transform(part, raster.transform),
        src_crs=raster.crs or _ANY_CRS,
        dst_transform=window_transform(window, like.transform),
        dst_crs=like.crs or _ANY_CRS,
        src_nodata=nodata,
        dst_nodata=nodata,
        resampling=Resampling[method],
        # The kernel's size may not depend on where windows are cut.
        XSCALE=1,
        YSCALE=1,
    )
    return result


def _border(window: Window, affine: Affine) -> tuple[_Axis, _Axis]:
    """Coordinates x and y of points around a window; an edge may become a curve in another CRS."""
    along = np.linspace(0, 1, 21)
    ends = np.zeros_like(along), np.ones_like(along)
    cols = np.concatenate([along, along, *ends]) * window.width
    rows = np.concatenate([*ends, along, along]) * window.height
    return _placed(affine, cols + window.col_off, rows + window.row_off)


def _placed(affine: Affine, x: _Axis, y: _Axis) -> tuple[_Axis, _Axis]:
    """The affine map of points."""
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f
