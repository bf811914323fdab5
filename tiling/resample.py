"""A source on another grid, resampled window by window from its pixels with data.

GDAL's warper computes each window; which pixels take part is told by the source alone, whatever its format.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.windows import Window

from tiling.errors import named
from tiling.grid import TileGrid
from tiling.source import Array, Handle, Profile, Source, SourceOfOne, avoid, holds

# Warping needs some CRS on both sides; where both are the same, any projected one stands in.
_ANY_CRS = CRS.from_epsg(3857)
_OPAQUE = 255
_MOST_PIXELS = 2**25
# Between CRSs GDAL interpolates along a row: always the same pieces of rows, whatever window is asked for.
_PIECE = 1024
# Pixels of the source on either side that a kernel takes in, where the source is no finer than the target.
_REACH = {"nearest": 1, "bilinear": 1, "cubic": 2, "cubic_spline": 2, "lanczos": 3}


@dataclass(frozen=True)
class Target:
    """The grid that a source is brought to."""

    crs: CRS | None
    transform: Affine
    height: int
    width: int
    resampling: Resampling


@dataclass(frozen=True)
class ResampledSource(SourceOfOne):
    """`inner` on the grid of `target`."""

    inner: Source
    target: Target

    @cached_property
    def profile(self) -> Profile:
        """The inner source's on the target's grid."""
        inner = self.inner.profile
        size = (self.target.height, self.target.width)
        change = Affine.shear(1, 1) if self.reprojects else ~inner.transform @ self.target.transform
        return replace(
            inner,
            shape=(inner.shape[0], *size),
            crs=self.target.crs,
            transform=self.target.transform,
            block_shape=(min(512, size[0]), min(512, size[1])),
            metadata=inner.metadata.on_grid(change),
        )

    @property
    def masked(self) -> bool:
        """A resampled pixel may have nothing under it."""
        return True

    @property
    def reprojects(self) -> bool:
        """Whether the target's CRS is another."""
        return self.target.crs != self.inner.profile.crs

    def open(self) -> Handle:
        """Open the inner source."""
        return ResampledHandle(self)


class ResampledHandle:
    """An open inner source and the way to its pixels."""

    def __init__(self, source: ResampledSource) -> None:
        self.source = source
        self.inner = source.inner.open()
        self.last: tuple[Any, tuple[Array, NDArray[np.bool_]]] | None = None

    def close(self) -> None:
        """Close the inner source."""
        self.last = None
        self.inner.close()

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W]; where the inner source has none, the band's nodata value, NaN or 0."""
        return self._both(window, bands)[0].copy()

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data: at least one inner pixel did."""
        return self._both(window, bands)[1].copy()

    def _both(self, window: Window, bands: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_]]:
        """Pixels are asked for first and their validity next: the last answer is kept."""
        key = (*window.flatten(), bands)
        if self.last is None or self.last[0] != key:
            self.last = None
            with named(self.source.name, "can't be resampled"):
                self.last = (key, self._resample(window, bands))
        return self.last[1]

    def _resample(self, window: Window, bands: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_]]:
        if not self.source.reprojects:
            return self._in_pieces(window, bands)
        left = window.col_off // _PIECE * _PIECE
        right = min(ceil((window.col_off + window.width) / _PIECE) * _PIECE, self.source.target.width)
        pieces = [
            self._in_pieces(Window(start, window.row_off, min(_PIECE, right - start), window.height), bands)
            for start in range(left, right, _PIECE)
        ]
        data, shown = (np.concatenate(part, axis=2) for part in zip(*pieces, strict=True))
        columns = slice(window.col_off - left, window.col_off - left + window.width)
        return data[:, :, columns], shown[:, :, columns]

    def _in_pieces(self, window: Window, bands: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_]]:
        """Piece by piece where much of the inner source lies under the window."""
        around = self._inner_window(window)
        fits = around.height * around.width * len(bands) <= _MOST_PIXELS
        by_rows = window.height > 1 and (window.height >= window.width or self.source.reprojects)
        if fits or not (by_rows or (window.width > 1 and not self.source.reprojects)):
            return self._piece(window, around, bands)
        size = (ceil(window.height / 2), window.width) if by_rows else (window.height, ceil(window.width / 2))
        pieces = [
            self._in_pieces(_shifted(tile.core, window), bands)
            for tile in TileGrid(window.height, window.width, size)
        ]
        data, shown = zip(*pieces, strict=True)
        axis = 1 if by_rows else 2
        return np.concatenate(data, axis=axis), np.concatenate(shown, axis=axis)

    def _piece(
        self, window: Window, around: Window, bands: tuple[int, ...]
    ) -> tuple[Array, NDArray[np.bool_]]:
        profile = self.source.inner.profile
        shape = (len(bands), window.height, window.width)
        out = np.empty(shape, profile.dtype)
        nodata = [profile.nodata_by_band[band] for band in bands]
        for band, value in enumerate(nodata):
            out[band] = _filling(profile.dtype, value)
        shown = np.zeros(shape, bool)
        if not (around.height and around.width and window.height and window.width):
            return out, shown
        data = self.inner.read(around, bands)
        valid = self.inner.valid(around, bands, data)
        if (picked := self._nearest(window, around)) is not None:
            rows, columns, inside = picked
            shown = valid[:, rows[:, None], columns] & inside
            np.copyto(out, data[:, rows[:, None], columns], where=shown)
            return out, shown
        # Bands that miss the same pixels are warped together.
        alike = bool((valid == valid[:1]).all())
        for group in [slice(0, len(bands))] if alike else [slice(k, k + 1) for k in range(len(bands))]:
            pixels, shown[group] = self._warp(data[group], valid[group.start], window, around)
            for band, value in enumerate(nodata[group], group.start):
                avoid(pixels[band - group.start], shown[band], value)
                np.copyto(out[band], pixels[band - group.start], where=shown[band])
        return out, shown

    def _nearest(
        self, window: Window, around: Window
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]] | None:
        """Rows [H] and columns [W] of the part `around` that are nearest to a window's.

        And whether they are in the source, [H, W]; None where the warper is needed.
        """
        profile, target = self.source.inner.profile, self.source.target
        change = ~profile.transform @ target.transform
        turned = max(abs(change.b), abs(change.d)) > 1e-9 * min(abs(change.a), abs(change.e))
        if target.resampling != Resampling.nearest or self.source.reprojects or turned:
            return None
        picked, inside = [], []
        for step, start, first, size, low, length in (
            (change.e, change.f, window.row_off, window.height, around.row_off, profile.shape[1]),
            (change.a, change.c, window.col_off, window.width, around.col_off, profile.shape[2]),
        ):
            # On the edge between two, up to rounding, the second is taken, as GDAL does.
            place = np.floor(step * (first + np.arange(size) + 0.5) + start + 1e-6).astype(np.intp)
            inside.append((place >= 0) & (place < length))
            picked.append(np.clip(place, 0, length - 1) - low)
        return picked[0], picked[1], inside[0][:, None] & inside[1]

    def _warp(
        self, data: Array, valid: NDArray[np.bool_], window: Window, around: Window
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Bands [B, h, w] with one mask [h, w] as pixels of the window, and which of those have data."""
        from rasterio.warp import reproject

        profile, target = self.source.inner.profile, self.source.target
        kind, count = _warped_dtype(profile.dtype), len(data)
        # The last band is alpha: missing pixels take no part, and the result tells where none had data.
        given = np.empty((count + 1, *data.shape[1:]), kind)
        given[:count] = data
        given[count] = valid.astype(np.uint8) * _OPAQUE
        if not valid.all():
            given[:count, ~valid] = 0
        warped = np.zeros((count + 1, window.height, window.width), kind)
        same = not self.source.reprojects
        reproject(
            given,
            warped,
            src_transform=profile.transform @ Affine.translation(around.col_off, around.row_off),
            src_crs=_ANY_CRS if same else profile.crs,
            dst_transform=target.transform @ Affine.translation(window.col_off, window.row_off),
            dst_crs=_ANY_CRS if same else target.crs,
            src_alpha=count + 1,
            dst_alpha=count + 1,
            resampling=target.resampling,
        )
        return warped[:count].astype(profile.dtype, copy=False), warped[count] > 0

    def _inner_window(self, window: Window) -> Window:
        """The inner pixels under a window, with the reach of the resampling kernel around them."""
        target, profile = self.source.target, self.source.inner.profile
        # The corners do where one grid is the other, moved and scaled; between CRSs the sides are curved.
        steps = np.linspace(0, 1, 21 if self.source.reprojects else 2)
        x = window.col_off + np.repeat(steps * window.width, len(steps))
        y = window.row_off + np.tile(steps * window.height, len(steps))
        x, y = target.transform @ (x, y)
        if self.source.reprojects:
            from rasterio.warp import transform

            x, y = (np.asarray(part) for part in transform(target.crs, profile.crs, x, y))
            x, y = x[np.isfinite(x + y)], y[np.isfinite(x + y)]
        if not x.size:
            return Window(0, 0, 0, 0)
        columns, rows = ~profile.transform @ (x, y)
        spans = []
        for place, size, length in (
            (columns, window.width, profile.shape[2]),
            (rows, window.height, profile.shape[1]),
        ):
            extent = float(place.max() - place.min())
            reach = _REACH.get(target.resampling.name, 1) * max(1.0, extent / max(size, 1)) + 3
            reach += 0.05 * extent if self.source.reprojects else 0
            start = min(max(0, floor(place.min() - reach)), length)
            spans.append((start, max(start, min(length, ceil(place.max() + reach)))))
        (left, right), (top, bottom) = spans
        return Window(left, top, right - left, bottom - top)


def _filling(dtype: np.dtype[Any], nodata: float | None) -> Any:
    if nodata is not None and holds(dtype, nodata):
        return nodata
    return np.nan if dtype.kind == "f" else 0


def _shifted(window: Window, by: Window) -> Window:
    return Window(window.col_off + by.col_off, window.row_off + by.row_off, window.width, window.height)


def _warped_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A type that GDAL can warp and that holds an opaque alpha."""
    if dtype.kind == "b" or dtype == np.int8:
        return np.dtype("int16")
    return np.dtype("float64") if dtype.kind in "iu" and dtype.itemsize == 8 else dtype
