"""Zarr arrays as a `Source`: what `create_zarr` makes, and plain ones with proj and spatial attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling.addresses import without_secrets
from tiling.conventions import KEY, read_colormap, read_crs, read_metadata, read_transform
from tiling.errors import RasterError, named
from tiling.source import Array, Handle, Profile, not_missing

if TYPE_CHECKING:
    import zarr


def is_zarr(path: str) -> bool:
    """Whether a path or URL names a zarr group or array, by its metadata or its ending."""
    folder = Path(path)
    if folder.is_dir():
        return any((folder / name).exists() for name in ("zarr.json", ".zgroup", ".zarray"))
    return path.rstrip("/").endswith(".zarr")


@dataclass(frozen=True)
class ZarrSource:
    """One level of a zarr raster: a group's array of that name, or a plain array."""

    path: str
    level: str = "0"

    @property
    def name(self) -> str:
        """The store, by name."""
        return without_secrets(self.path)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The store."""
        return (self.path,)

    @cached_property
    def profile(self) -> Profile:
        """From the array's attributes, or where it has none from its group's."""
        handle = ZarrHandle(self)
        return handle.profile

    @cached_property
    def masked(self) -> bool:
        """Whether the store has a mask."""
        return ZarrHandle(self).mask is not None

    @cached_property
    def shared(self) -> bool:
        """Whether the mask, if there is one, is that of all bands."""
        mask = ZarrHandle(self).mask
        return (mask is None or mask.ndim == 2) and self.profile.nodata is None

    def coarser(self, factor: float, method: str) -> ZarrSource:
        """The coarsest level of a pyramid made by `method` with pixels at most `factor` times as large.

        Averages of averages and votes on votes go on as one would from the finest level; nothing else does.
        """
        import zarr

        with named(self.path, "not a zarr store that can be read"):
            node = zarr.open(self.path, mode="r")
        made: Any = node.attrs.get("multiscales")
        if not isinstance(node, zarr.Group) or not made or method not in ("average", "mode"):
            return self
        level = 0
        while 2 ** (level + 1) <= factor and str(level + 1) in node:
            level += 1
        return ZarrSource(self.path, str(level)) if made.get("resampling_method") == method else self

    def open(self) -> Handle:
        """Open the store."""
        return ZarrHandle(self)


class ZarrHandle:
    """An open zarr array and, where the store has one, its mask."""

    def __init__(self, source: ZarrSource) -> None:
        self.path = source.path
        with named(source.path, "not a zarr store that can be read"):
            self.array, attributes, self.mask = _open(source.path, source.level)
            self.flat = self.array.ndim == 2
            self.profile = _profile(source.path, self.array, attributes)
            if self.mask is not None and self.mask.shape not in (self.profile.shape, self.profile.shape[1:]):
                raise RasterError(
                    f"{source.path}: a mask of {self.mask.shape} for pixels of {self.profile.shape}"
                )

    def close(self) -> None:
        """Zarr keeps no file open."""

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W]."""
        with named(self.path, f"can't read {window}"):
            return self._read(window, bands)

    def _read(self, window: Window, bands: tuple[int, ...]) -> Array:
        rows, columns = window.toslices()
        if self.flat:
            return np.repeat(np.asarray(self.array[rows, columns])[None], len(bands), axis=0)
        if bands == tuple(range(bands[0], bands[0] + len(bands))):
            return np.asarray(self.array[bands[0] : bands[0] + len(bands), rows, columns])
        return np.stack([np.asarray(self.array[band, rows, columns]) for band in bands])

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data: by nodata value, NaN and mask."""
        nodata = self.profile.nodata
        if nodata is not None or np.issubdtype(self.profile.dtype, np.floating):
            data = self.read(window, bands) if data is None else data
            valid = not_missing(data, (nodata,) * len(bands))
        else:
            valid = np.ones((len(bands), window.height, window.width), bool)
        if self.mask is not None:
            rows, columns = window.toslices()
            with named(self.path, f"can't read {window}"):
                shown = np.asarray(self.mask[..., rows, columns]) > 0
            valid &= shown if shown.ndim == 2 else shown[list(bands)]
        return valid


def _open(path: str, level: str) -> tuple[zarr.Array[Any], dict[str, Any], zarr.Array[Any] | None]:
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        return node, dict(node.attrs), None
    array, arrays = node.get(level), [level]
    if not isinstance(array, zarr.Array):
        arrays = [name for name, _ in node.arrays()]
        array = node.get(arrays[0]) if len(arrays) == 1 else None
    if not isinstance(array, zarr.Array):
        raise RasterError(f"{path}: no array {level!r} in this zarr group, only {arrays or 'none'}")
    mask = node.get(f"mask/{level}")
    return array, {**dict(node.attrs), **dict(array.attrs)}, mask if isinstance(mask, zarr.Array) else None


def _profile(path: str, array: zarr.Array[Any], attributes: Mapping[str, Any]) -> Profile:
    shape = tuple(array.shape)
    if len(shape) not in (2, 3):
        raise RasterError(f"{path}: a raster has 2 or 3 axes, this array has {len(shape)}: {shape}")
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise RasterError(f"{path}: pixels must be numbers, not {array.dtype}")
    if np.issubdtype(array.dtype, np.complexfloating):
        raise RasterError(f"{path}: complex pixels ({array.dtype}) have no meaning here")
    _check_axes(path, array, attributes)
    bands, height, width = (1, *shape) if len(shape) == 2 else shape
    own = attributes.get(KEY, {})
    names = tuple(str(name) for name in own.get("band_names") or (f"band_{i + 1}" for i in range(bands)))
    if len(names) != bands:
        raise RasterError(f"{path}: {len(names)} band names for {bands} bands: {', '.join(names)}")
    nodata = own.get("nodata", attributes.get("nodata"))
    return Profile(
        shape=(bands, height, width),
        dtype=np.dtype(array.dtype),
        crs=read_crs(attributes, path),
        transform=read_transform(attributes, path),
        nodata=_nodata(nodata),
        band_names=names,
        block_shape=(array.chunks[-2], array.chunks[-1]),
        colormap=read_colormap(own),
        tags=dict(own.get("tags", {})),
        metadata=read_metadata(attributes, bands),
    )


def _nodata(value: Any) -> float | None:
    """As GDAL has it, a float, but for whole numbers that a float would round."""
    if value is None or (isinstance(value, int) and abs(value) > 2**53):
        return value
    return float(value)


def _check_axes(path: str, array: zarr.Array[Any], attributes: Mapping[str, Any]) -> None:
    """Rows and columns must be the last two axes, in this order, where names say which is which."""
    names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    spatial = attributes.get("spatial:dimensions")
    if names and spatial and tuple(names[-2:]) != tuple(spatial):
        raise RasterError(f"{path}: the last axes must be {tuple(spatial)}, the array has {tuple(names)}")
