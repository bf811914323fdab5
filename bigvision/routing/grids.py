"""Whether two rasters of one place share a pixel grid, and by how much they are shifted if not."""

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.warp import Resampling, reproject
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from tiling import Raster

_WHOLE = 1e-6  # of a pixel: rounding of coordinates in files


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
    cols, rows = ~b * (a.c, a.f)
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
            f"({a.c - b.c:g} and {a.f - b.f:g} in units of the CRS); resample it if near is near enough"
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

    Only the part under the window is read.
    """
    target = window_transform(window, like.transform)
    corners = [(c, r) for c in (0, window.width) for r in (0, window.height)]
    inverse: Affine = ~raster.transform * target
    xs, ys = zip(*(inverse * corner for corner in corners), strict=True)
    left, top = max(int(np.floor(min(xs))) - 2, 0), max(int(np.floor(min(ys))) - 2, 0)
    right, bottom = (
        min(int(np.ceil(max(xs))) + 2, raster.width),
        min(int(np.ceil(max(ys))) + 2, raster.height),
    )
    fill = raster.nodata if raster.nodata is not None else 0
    result = np.full((raster.shape[0], window.height, window.width), fill, raster.dtype)
    if left >= right or top >= bottom:
        return result
    under = Window(left, top, right - left, bottom - top)
    reproject(
        raster.read(under),
        result,
        src_transform=window_transform(under, raster.transform),
        src_crs=raster.crs,
        dst_transform=target,
        dst_crs=like.crs,
        src_nodata=raster.nodata,
        dst_nodata=raster.nodata,
        resampling=Resampling[method],
    )
    return result
