"""Where pixels come from: a `Source` says what to open, its `Handle` is open in one thread.

Shapes: B bands, H and W rows and columns of the window asked for.
"""

import os
import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from tiling.metadata import Metadata

Array = NDArray[Any]
Colormap = dict[int, tuple[int, int, int, int]]


@dataclass(frozen=True)
class Profile:
    """What a raster is, apart from its pixels.

    shape: (bands, height, width). nodata: the value of missing pixels, in every band; no pixel with data has
    it. block_shape: rows and columns that are stored together. colormap: class value -> (red, green, blue,
    alpha). tags: provenance. band_nodata: for each band the value that tells its missing pixels, where bands
    have values of their own; empty where `nodata` is that of all. metadata: what else is kept in a copy.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    crs: CRS | None
    transform: Affine
    nodata: float | None
    band_names: tuple[str, ...]
    block_shape: tuple[int, int]
    colormap: Colormap | None = None
    tags: dict[str, str] = field(default_factory=dict)
    band_nodata: tuple[float | None, ...] = ()
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def nodata_by_band(self) -> tuple[float | None, ...]:
        """The value of each band's missing pixels."""
        return self.band_nodata or (self.nodata,) * self.shape[0]


class Handle(Protocol):
    """Open files of one thread. Bands are positions from 0; windows lie inside the source."""

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W]."""

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels have data, [B, H, W]; `data` spares a second read where the caller has it."""

    def close(self) -> None:
        """Give the files back."""


class Source(Protocol):
    """A picklable description of pixels."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The files, URLs and stores that it reads."""

    @property
    def profile(self) -> Profile:
        """Of all its bands and its whole extent."""

    @property
    def masked(self) -> bool:
        """Whether anything but the profile's nodata value can say that pixels are missing: a mask, an alpha
        band, a band's own value."""

    @property
    def shared(self) -> bool:
        """Whether all bands miss the same pixels, NaN aside."""

    def open(self) -> Handle:
        """Open it here and now."""


class SourceOfOne:
    """What a source that changes the pixels of one other, `inner`, takes from it as it is."""

    inner: Source

    @property
    def name(self) -> str:
        """The inner source's."""
        return self.inner.name

    @property
    def addresses(self) -> tuple[str, ...]:
        """The inner source's."""
        return self.inner.addresses

    @property
    def shared(self) -> bool:
        """As in the inner source."""
        return self.inner.shared


class Handles(threading.local):
    """One open handle a thread, opened on first use; never shared with a forked child."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.pid = os.getpid()
        self.handle: Handle | None = None
        self.inherited: Handle | None = None

    def get(self) -> Handle:
        """This thread's handle."""
        if self.pid != os.getpid():
            # The parent's handle shares its file offset and perhaps a held lock: keep away from it.
            self.pid, self.inherited, self.handle = os.getpid(), self.handle, None
        if self.handle is None:
            self.handle = self.source.open()
        return self.handle

    def close(self) -> None:
        """Close this thread's handle; the next `get` opens it again."""
        if self.handle is not None and self.pid == os.getpid():
            self.handle.close()
        self.handle = None


def not_missing(data: Array, nodata: tuple[float | None, ...]) -> NDArray[np.bool_]:
    """Where `data` [B, H, W] is neither its band's nodata value nor NaN."""
    valid = np.ones(data.shape, bool)
    if np.issubdtype(data.dtype, np.floating):
        valid &= ~np.isnan(data)
    for band, value in enumerate(nodata):
        if value is not None and holds(data.dtype, value) and not np.isnan(value):
            # A nodata value that float32 rounds still means those pixels.
            valid[band] &= data[band] != np.asarray(value).astype(data.dtype)
    return valid


def common_nodata(values: tuple[float | None, ...], dtype: np.dtype[Any]) -> float | None:
    """The nodata value of every band; None where bands differ, one has none, or pixels can't have it."""
    first = values[0]
    if first is None or not holds(dtype, first):
        return None
    alike = (
        value is not None and (value == first or (value != value and first != first)) for value in values
    )
    return first if all(alike) else None


def avoid(data: Array, valid: NDArray[np.bool_], nodata: float | None) -> None:
    """Move computed pixels with data off the nodata value, in place, by the least step there is."""
    if nodata is None or np.isnan(nodata) or not holds(data.dtype, nodata):
        return
    value = np.asarray(nodata).astype(data.dtype)
    hit = valid & (data == value)
    if data.dtype.kind == "f":
        data[hit] = np.nextafter(value, data.dtype.type(0) if value else data.dtype.type(1))
    elif data.dtype.kind in "iu":
        data[hit] = value - 1 if value == np.iinfo(data.dtype).max else value + 1


def holds(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a pixel of `dtype` can have this value (floats may round it)."""
    if np.issubdtype(dtype, np.floating):
        with np.errstate(over="ignore"):
            return bool(not np.isfinite(value) or np.isfinite(np.float64(value).astype(dtype)))
    if dtype.kind == "b":
        return value in (0, 1)
    info = np.iinfo(dtype)
    return bool(np.isfinite(value) and value == int(value) and info.min <= value <= info.max)
