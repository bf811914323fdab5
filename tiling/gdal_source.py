"""GeoTIFF, COG, VRT and every other format of GDAL as a `Source`: bands of one file."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.windows import Window

from tiling.addresses import without_secrets
from tiling.errors import RasterError, named
from tiling.metadata import metadata_of
from tiling.source import Array, Colormap, Profile, common_nodata
from tiling.validity import validity_of

# What the TIFF driver says of the file itself, not of what it shows.
_FORMAT_TAGS = {
    "AREA_OR_POINT",
    "OVR_RESAMPLING_ALG",
    "TIFFTAG_XRESOLUTION",
    "TIFFTAG_YRESOLUTION",
    "TIFFTAG_RESOLUTIONUNIT",
}


@dataclass(frozen=True)
class GdalSource:
    """Bands of one file: `indexes` count from 1 as GDAL does."""

    path: str
    indexes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file, by name."""
        return without_secrets(self.path)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The file."""
        return (self.path,)

    @cached_property
    def profile(self) -> Profile:
        """What the file says of itself."""
        return self._look[0]

    @property
    def masked(self) -> bool:
        """Whether the file has a mask, or an alpha band that isn't among the bands."""
        return self._look[1]

    @property
    def shared(self) -> bool:
        """Whether one mask is that of all bands."""
        return self._look[2]

    def open(self) -> "GdalHandle":
        """Open the file."""
        return GdalHandle(self)

    @cached_property
    def _look(self) -> tuple[Profile, bool, bool]:
        handle = self.open()
        try:
            return handle.profile(), handle.validity.masked, handle.validity.shared
        finally:
            handle.close()


class GdalHandle:
    """A file, open in one thread."""

    def __init__(self, source: GdalSource) -> None:
        self.source = source
        self.dataset = open_dataset(source.path)
        try:
            with named(source.path, "not a raster that can be read"):
                self.validity = validity_of(self.dataset, source.indexes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.dataset.close()

    def profile(self) -> Profile:
        """What the bands are."""
        with named(self.source.path, "not a raster that can be read"):
            return self._profile()

    def _profile(self) -> Profile:
        file, indexes = self.dataset, self.source.indexes
        dtype = np.result_type(*[_checked_dtype(self.source.path, file.dtypes[i - 1]) for i in indexes])
        return Profile(
            shape=(len(indexes), file.height, file.width),
            dtype=dtype,
            crs=file.crs,
            transform=file.transform,
            nodata=common_nodata(self.validity.nodata, dtype),
            band_nodata=self.validity.nodata,
            band_names=tuple(file.descriptions[i - 1] or f"band_{i}" for i in indexes),
            block_shape=file.block_shapes[0],
            colormap=_colormap(file, indexes[0]) if len(indexes) == 1 else None,
            metadata=metadata_of(file, indexes),
            tags={k: v for k, v in file.tags().items() if k not in _FORMAT_TAGS},
        )

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W] in the bands' common dtype."""
        indexes = [self.source.indexes[band] for band in bands]
        with named(self.source.path, f"can't read {_where(window)}"):
            data: Array = self.dataset.read(indexes, window=window)
        return data.astype(self.source.profile.dtype, copy=False)

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data, as `Validity` tells it."""
        if data is None and self._needs_pixels(bands):
            data = self.read(window, bands)
        if data is None:
            data = np.broadcast_to(np.uint8(0), (len(bands), window.height, window.width))
        with named(self.source.path, f"can't read {_where(window)}"):
            return self.validity.read(self.dataset, window, bands, data)

    def _needs_pixels(self, bands: tuple[int, ...]) -> bool:
        floating = np.issubdtype(self.source.profile.dtype, np.floating)
        return floating or any(self.validity.nodata[band] is not None for band in bands)


def open_dataset(path: str) -> DatasetReader:
    """`rasterio.open`, with one clear RasterError for what isn't a readable raster."""
    with named(path, "not a raster that can be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = rasterio.open(path)
    try:
        if dataset.count == 0:
            names = dataset.subdatasets[:3]
            raise RasterError(f"{path}: holds no bands itself" + (f"; open one of {names}" if names else ""))
        for name in dataset.dtypes:
            _checked_dtype(path, name)
    except BaseException:
        dataset.close()
        raise
    return dataset


def _checked_dtype(path: str, name: str) -> np.dtype[Any]:
    if name.startswith("complex"):
        raise RasterError(f"{path}: complex pixels ({name}) have no meaning here; split them into real bands")
    return np.dtype(name)


def _colormap(dataset: DatasetReader, band: int) -> Colormap | None:
    try:
        colors = dataset.colormap(band)
    except ValueError:
        return None
    return {int(value): tuple(color) for value, color in colors.items()}


def _where(window: Window) -> str:
    return (
        f"rows {window.row_off}-{window.row_off + window.height}, "
        f"columns {window.col_off}-{window.col_off + window.width}"
    )
