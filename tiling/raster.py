"""A georeferenced raster of any size: a handle that is cheap to copy, pickle and share between threads.

Shapes: B bands, H and W rows and columns of the window asked for.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import array_bounds
from rasterio.windows import Window

from tiling.area import Area
from tiling.errors import RasterError
from tiling.source import Array, Colormap, Handles, Profile, Source, common_nodata, holds

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

Bands = Sequence[int | str] | None


class Raster:
    """Bands of a source within a window of it; immutable, and made by `open_raster`.

    Any thread and any process may read: each thread opens its own files, a pickled or forked copy opens them
    anew. Files are closed with the raster, with their thread, or by `close`.
    """

    __slots__ = ("__weakref__", "_area", "_bands", "_handles", "_origin", "_profile", "_source")

    def __init__(
        self, source: Source, *, bands: tuple[int, ...] | None = None, area: Area | None = None
    ) -> None:
        whole = source.profile
        chosen = tuple(range(whole.shape[0])) if bands is None else bands
        window = area.window if area else Window(0, 0, whole.shape[2], whole.shape[1])
        nodata = tuple(whole.nodata_by_band[band] for band in chosen)
        shift = whole.transform @ Affine.translation(window.col_off, window.row_off)
        profile = Profile(
            shape=(len(chosen), window.height, window.width),
            dtype=whole.dtype,
            crs=whole.crs,
            transform=shift,
            nodata=common_nodata(nodata, whole.dtype),
            band_nodata=nodata,
            band_names=tuple(whole.band_names[band] for band in chosen),
            block_shape=whole.block_shape,
            colormap=whole.colormap,
            tags=whole.tags,
            metadata=whole.metadata.chosen(chosen).on_grid(
                Affine.translation(window.col_off, window.row_off)
            ),
        )
        state = (source, chosen, (window.row_off, window.col_off), area, profile)
        self.__setstate__(state)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._source, self._bands, self._origin, self._area, self._profile

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        names = ("_source", "_bands", "_origin", "_area", "_profile")
        for name, value in zip(names, state, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_handles", Handles(state[0]))

    if TYPE_CHECKING:
        _source: Source
        _bands: tuple[int, ...]
        _origin: tuple[int, int]
        _area: Area | None
        _profile: Profile
        _handles: Handles

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Raster is immutable; can't set {name}")

    @property
    def name(self) -> str:
        """The file or files it reads."""
        return self._source.name

    @property
    def addresses(self) -> tuple[str, ...]:
        """The files, URLs and stores that it reads, one by one."""
        return self._source.addresses

    @property
    def profile(self) -> Profile:
        """Everything it is apart from its pixels, as one value."""
        return self._profile

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self._profile.shape

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    @property
    def height(self) -> int:
        """Rows."""
        return self.shape[1]

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[2]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels that `read` returns."""
        return self._profile.dtype

    @property
    def crs(self) -> CRS | None:
        """The coordinate reference system, None where the file names none."""
        return self._profile.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) to coordinates; rotated and south-up rasters keep theirs."""
        return self._profile.transform

    @property
    def nodata(self) -> float | None:
        """The value of missing pixels in every band, which none with data has; None where there is none.

        Where bands have values of their own, or a mask goes before the value, there is none: `has_mask`.
        """
        return self._profile.nodata

    @property
    def band_names(self) -> tuple[str, ...]:
        """One name a band: its description in the file, or `band_1` and so on."""
        return self._profile.band_names

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that the file stores together."""
        return self._profile.block_shape

    @property
    def colormap(self) -> Colormap | None:
        """Class value -> (red, green, blue, alpha), where the raster has a colour table."""
        return self._profile.colormap

    @property
    def tags(self) -> dict[str, str]:
        """Texts stored with the raster."""
        return dict(self._profile.tags)

    @property
    def has_mask(self) -> bool:
        """Whether pixels other than `nodata` can be missing: by mask, alpha, a band's own value, area."""
        return (
            self._source.masked
            or self._differs
            or (self._area is not None and self._area.geometry is not None)
        )

    @property
    def shares_mask(self) -> bool:
        """Whether all bands miss the same pixels, NaN aside."""
        return self.shape[0] == 1 or (self._source.shared and not self._differs)

    @property
    def _differs(self) -> bool:
        values = self._profile.nodata_by_band
        return self.nodata is None and any(v is not None and holds(self.dtype, v) for v in values)

    @property
    def area(self) -> Area | None:
        """The window of its source that it shows, and the area of interest there; None where it is whole."""
        return self._area

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in CRS units, of the box around the raster if it is rotated."""
        return tuple(array_bounds(self.height, self.width, self.transform))

    def read(self, window: Window | None = None, bands: Bands = None, *, masked: bool = False) -> Array:
        """Pixels [B, H, W] of a window (the whole raster by default) and of bands, by number from 1 or name.

        masked: return a `numpy.ma.MaskedArray`, masked where a band has no data or the area of interest ends.
        Raises RasterError for a window beyond the raster, an unknown band, and a file that can't be read.
        """
        inner, chosen = self._inner(window), self._chosen(bands)
        handle = self._handles.get()
        data = handle.read(inner, chosen)
        if not masked:
            return data
        valid = handle.valid(inner, chosen, data)
        if self._area is not None:
            valid &= self._area.inside(inner, self._source.profile.transform)
        return np.ma.MaskedArray(data, mask=~valid, fill_value=self.nodata)

    def mask(self, window: Window | None = None, *, data: Array | None = None) -> NDArray[np.bool_]:
        """True [H, W] where any band has data: by nodata value, NaN, mask or alpha band, area of interest.

        data: what `read(window)` returned, to spare reading it a second time.
        """
        inner = self._inner(window)
        valid = self._handles.get().valid(inner, self._bands, data).any(axis=0)
        if self._area is not None:
            valid &= self._area.inside(inner, self._source.profile.transform)
        return np.asarray(valid)

    def __getitem__(self, key: Any) -> Array:
        """NumPy indexing `raster[bands, rows, columns]`, from 0; only what is asked for is read."""
        keys = _full_key(key)
        ranges, drop, steps = [], [], []
        for axis, (item, size) in enumerate(zip(keys, self.shape, strict=True)):
            picked = _as_range(item, size)
            ranges.append(picked)
            drop.append(axis) if not isinstance(item, slice) else None
            steps.append(slice(None, None, picked.step))
        bands = tuple(self._bands[band] for band in ranges[0])
        low = [min(r[0], r[-1]) if len(r) else 0 for r in ranges[1:]]
        extent = [abs(r[-1] - r[0]) + 1 if len(r) else 0 for r in ranges[1:]]
        if not bands or not min(extent):
            data = np.empty((len(bands), len(ranges[1]), len(ranges[2])), self.dtype)
        else:
            window = self._inner(Window(low[1], low[0], extent[1], extent[0]))
            data = self._handles.get().read(window, bands)[:, steps[1], steps[2]]
        return data[tuple(0 if axis in drop else slice(None) for axis in range(3))]

    def select(self, bands: Bands = None, window: Window | None = None) -> Raster:
        """The same raster with fewer bands (by number from 1 or name) or within a window of it."""
        inner = self._inner(window)
        geometry = self._area.geometry if self._area else None
        area = self._area if window is None else Area(inner, geometry)
        return Raster(self._source, bands=self._chosen(bands), area=area)

    def to_dask(self, chunks: tuple[int, int] | None = None) -> da.Array:
        """A lazy `dask.array` [B, H, W]; chunks (rows, columns) default to about 2048 in whole blocks."""
        import dask.array as da

        rows, columns = chunks or _chunks(self.block_shape, (self.height, self.width))
        lazy: da.Array = da.from_array(  # type: ignore[no-untyped-call]
            self,
            chunks=(self.shape[0], rows, columns),
            name=f"raster-{uuid.uuid4().hex}",  # unlike any other: the file may change under its name
            meta=np.empty((0, 0, 0), self.dtype),
            inline_array=False,
        )
        return lazy

    def to_xarray(self, chunks: tuple[int, int] | None = None) -> xr.DataArray:
        """A lazy `xarray.DataArray` with pixel-centre coordinates and `spatial_ref` as rioxarray reads it."""
        import xarray as xr

        coords: dict[str, Any] = {"band": list(self.band_names)}
        if self.transform.is_rectilinear and self.transform.b == 0:
            coords["x"] = self.transform.c + self.transform.a * (np.arange(self.width) + 0.5)
            coords["y"] = self.transform.f + self.transform.e * (np.arange(self.height) + 0.5)
        reference = {"GeoTransform": " ".join(str(value) for value in self.transform.to_gdal())}
        if self.crs is not None:
            reference["crs_wkt"] = self.crs.to_wkt()
        coords["spatial_ref"] = xr.Variable((), 0, reference)
        attrs = {} if self.nodata is None else {"_FillValue": self.nodata}
        name = os.path.basename(self.name)  # noqa: PTH119 - a name, not a path
        return xr.DataArray(self.to_dask(chunks), coords, ("band", "y", "x"), name, {**self.tags, **attrs})

    def close(self) -> None:
        """Close this thread's files; the next read opens them again."""
        self._handles.close()

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        bands, height, width = self.shape
        crs = self.crs.to_string() if self.crs is not None else "no CRS"
        return f"Raster({self.name}: {bands} x {height} x {width}, {self.dtype}, {crs}, nodata {self.nodata})"

    def _inner(self, window: Window | None) -> Window:
        """A window of this raster as one of the source; RasterError where it isn't inside."""
        row, col = self._origin
        if window is None:
            return Window(col, row, self.width, self.height)
        values = (window.col_off, window.row_off, window.width, window.height)
        left, top, width, height = (int(value) for value in values)
        inside = 0 <= left <= left + width <= self.width and 0 <= top <= top + height <= self.height
        if (left, top, width, height) != values or not inside or width < 0 or height < 0:
            raise RasterError(
                f"{self.name}: {window} isn't made of whole pixels within {self.height} x {self.width}"
            )
        return Window(left + col, top + row, width, height)

    def _chosen(self, bands: Bands) -> tuple[int, ...]:
        if bands is None:
            return self._bands
        return tuple(self._bands[i] for i in band_positions(self.name, bands, self.band_names))


def band_positions(name: str, bands: Sequence[int | str], names: tuple[str, ...]) -> tuple[int, ...]:
    """Positions from 0 of bands given by number from 1 or by name; RasterError for one that isn't there."""
    positions = []
    for band in bands:
        position = names.index(band) if band in names else band - 1 if isinstance(band, int) else -1
        if not 0 <= position < len(names):
            raise RasterError(f"{name}: no band {band!r} among {len(names)} bands {', '.join(names)}")
        positions.append(position)
    if not positions:
        raise RasterError(f"{name}: no bands chosen")
    return tuple(positions)


def _full_key(key: Any) -> tuple[Any, Any, Any]:
    keys = key if isinstance(key, tuple) else (key,)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys = keys[:at] + (slice(None),) * (4 - len(keys)) + keys[at + 1 :]
    if len(keys) > 3:
        raise IndexError(f"a raster has 3 axes, the index has {len(keys)}: {key}")
    first, second, third = keys + (slice(None),) * (3 - len(keys))
    return first, second, third


def _as_range(item: Any, size: int) -> range:
    if isinstance(item, slice):
        return range(size)[item]
    position = item.__index__()
    if not -size <= position < size:
        raise IndexError(f"index {position} of an axis of {size}")
    return range(position % size, position % size + 1)


def _chunks(block: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """About 2048 x 2048 pixels in whole blocks: strips as wide as the raster, tiles square."""
    columns = min(size[1], max(1, 2048 // block[1]) * block[1])
    rows = max(1, 2**22 // max(columns, 1) // block[0]) * block[0]
    return min(size[0], rows), columns
