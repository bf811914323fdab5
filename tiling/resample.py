"""A source on another grid of the same CRS, resampled window by window: for formats that GDAL can't warp."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from tiling.gdal_source import Target
from tiling.grid import TileGrid
from tiling.source import Array, Handle, Profile, Source

_ANY_CRS = CRS.from_epsg(3857)
_OPAQUE = 255
_MOST_PIXELS = 2**25


@dataclass(frozen=True)
class ResampledSource:
    """`inner` on the grid of `target`, whose CRS is the same."""

    inner: Source
    target: Target

    @property
    def name(self) -> str:
        """The inner source's."""
        return self.inner.name

    @property
    def addresses(self) -> tuple[str, ...]:
        """The inner source's."""
        return self.inner.addresses

    @cached_property
    def profile(self) -> Profile:
        """The inner source's on the target's grid."""
        inner = self.inner.profile
        size = (self.target.height, self.target.width)
        return replace(
            inner,
            shape=(inner.shape[0], *size),
            transform=self.target.transform,
            block_shape=(min(512, size[0]), min(512, size[1])),
        )

    @property
    def masked(self) -> bool:
        """A resampled pixel may have nothing under it."""
        return True

    def open(self) -> Handle:
        """Open the inner source."""
        return ResampledHandle(self)


class ResampledHandle:
    """An open inner source and the way to its pixels."""

    def __init__(self, source: ResampledSource) -> None:
        self.source = source
        self.inner = source.inner.open()

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W]; where the inner source has none, its nodata value or 0."""
        return self._resample(window, bands)[0]

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data: at least one inner pixel did."""
        return self._resample(window, bands)[1]

    def _resample(self, window: Window, bands: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_]]:
        """Piece by piece where much of the inner source lies under the window."""
        around = self._inner_window(window)
        if around.height * around.width * len(bands) <= _MOST_PIXELS or window.height * window.width <= 1:
            return self._resample_piece(window, bands)
        by_rows = window.height >= window.width
        size = (
            ((window.height + 1) // 2, window.width) if by_rows else (window.height, (window.width + 1) // 2)
        )
        pieces = [
            self._resample(_shifted(tile.core, window), bands)
            for tile in TileGrid(window.height, window.width, size)
        ]
        data, shown = zip(*pieces, strict=True)
        axis = 1 if by_rows else 2
        return np.concatenate(data, axis=axis), np.concatenate(shown, axis=axis)

    def _resample_piece(self, window: Window, bands: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_]]:
        from rasterio.warp import reproject

        profile = self.source.inner.profile
        shape = (len(bands), window.height, window.width)
        fill = 0 if profile.nodata is None else profile.nodata
        out = np.full(shape, fill, profile.dtype)
        shown = np.zeros(shape, bool)
        around = self._inner_window(window)
        if not (around.height and around.width and window.height and window.width):
            return out, shown
        data = self.inner.read(around, bands)
        valid = self.inner.valid(around, bands, data)
        here = self.source.target.transform @ Affine.translation(window.col_off, window.row_off)
        there = profile.transform @ Affine.translation(around.col_off, around.row_off)
        kind = _warped_dtype(profile.dtype)
        for band in range(len(bands)):
            # The second band is alpha: missing pixels take no part, and the result tells where none had data.
            pair = np.stack([data[band], np.where(valid[band], _OPAQUE, 0)]).astype(kind)
            warped = np.zeros((2, *shape[1:]), kind)
            reproject(
                pair,
                warped,
                src_transform=there,
                src_crs=_ANY_CRS,
                dst_transform=here,
                dst_crs=_ANY_CRS,
                src_alpha=2,
                dst_alpha=2,
                resampling=self.source.target.resampling,
            )
            shown[band] = warped[1] > 0
            out[band][shown[band]] = warped[0][shown[band]].astype(profile.dtype)
        return out, shown

    def _inner_window(self, window: Window) -> Window:
        """The inner pixels under a window, with the reach of the widest resampling kernel around them."""
        target, profile = self.source.target, self.source.inner.profile
        to_inner = ~profile.transform @ target.transform
        x0, y0 = to_inner @ (window.col_off, window.row_off)
        x1, y1 = to_inner @ (window.col_off + window.width, window.row_off + window.height)
        reach_x, reach_y = 4 * max(1.0, to_inner.a) + 2, 4 * max(1.0, to_inner.e) + 2
        left, right = max(0, int(x0 - reach_x)), min(profile.shape[2], int(x1 + reach_x) + 1)
        top, bottom = max(0, int(y0 - reach_y)), min(profile.shape[1], int(y1 + reach_y) + 1)
        return Window(left, top, max(0, right - left), max(0, bottom - top))


def _shifted(window: Window, by: Window) -> Window:
    return Window(window.col_off + by.col_off, window.row_off + by.row_off, window.width, window.height)


def _warped_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A type that GDAL can warp and that holds an opaque alpha."""
    if dtype.kind == "b" or dtype == np.int8:
        return np.dtype("int16")
    return np.dtype("float64") if dtype.kind in "iu" and dtype.itemsize == 8 else dtype
