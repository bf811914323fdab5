"""GeoTIFF, COG, VRT and every other format of GDAL as a `Source`; also several files stacked.

Each file gives some bands of the stack, either as it is or warped to the common grid (`WarpedVRT`).
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from tiling.errors import RasterError
from tiling.source import Array, Colormap, Handle, Profile, holds, not_missing

# Warping needs some CRS on both sides; where a raster has none, any projected one stands in.
_ANY_CRS = CRS.from_epsg(3857)
# What the TIFF driver says of the file itself, not of what it shows.
_FORMAT_TAGS = {
    "AREA_OR_POINT",
    "OVR_RESAMPLING_ALG",
    "TIFFTAG_XRESOLUTION",
    "TIFFTAG_YRESOLUTION",
    "TIFFTAG_RESOLUTIONUNIT",
}


@dataclass(frozen=True)
class Target:
    """The grid that a file is warped to."""

    crs: CRS | None
    transform: Affine
    height: int
    width: int
    resampling: Resampling


@dataclass(frozen=True)
class Part:
    """Bands of one file: `indexes` count from 1 as GDAL does."""

    path: str
    indexes: tuple[int, ...]
    target: Target | None = None


@dataclass(frozen=True)
class GdalSource:
    """Bands of one or several files on one grid."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The files, by name."""
        return ", ".join(self.addresses)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The files, one each."""
        return tuple(part.path for part in self.parts)

    @cached_property
    def profile(self) -> Profile:
        """The first file's grid; every file's bands."""
        handle = GdalHandle(self)
        try:
            return handle.profile()
        finally:
            handle.close()

    @cached_property
    def masked(self) -> bool:
        """Whether any file has a mask, an alpha band that isn't data, or a nodata value of its own."""
        handle = GdalHandle(self)
        try:
            own = {value for part in handle.parts for value in part.nodata if value == value}
            return len(own) > 1 or any(part.alpha is not None or part.has_mask for part in handle.parts)
        finally:
            handle.close()

    def open(self) -> Handle:
        """Open every file."""
        return GdalHandle(self)


class _OpenPart:
    """One file, open, with what tells its valid pixels from its missing ones."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.file = open_dataset(part.path)
        self.dataset: Any = _warp(self.file, part.target) if part.target else self.file
        alpha = [i for i, c in enumerate(self.dataset.colorinterp, 1) if c == ColorInterp.alpha]
        self.alpha = next((i for i in alpha if i not in part.indexes), None)
        flags = self.dataset.mask_flag_enums[part.indexes[0] - 1]
        self.has_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
        self.nodata = tuple(self.dataset.nodatavals[i - 1] for i in part.indexes)

    def close(self) -> None:
        if self.dataset is not self.file:
            self.dataset.close()
        self.file.close()

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        indexes = [self.part.indexes[band] for band in bands]
        try:
            data: Array = self.dataset.read(indexes, window=window)
        except (RasterioError, OSError) as error:
            raise RasterError(f"{self.part.path}: can't read {_where(window)}: {_cause(error)}") from error
        return data

    def shown(self, window: Window) -> NDArray[np.bool_] | None:
        """Which pixels [H, W] the file's mask or alpha band shows; None where it has neither."""
        try:
            if self.alpha is not None:
                return np.asarray(self.dataset.read(self.alpha, window=window) > 0)
            if self.has_mask:
                return np.asarray(self.dataset.read_masks(self.part.indexes[0], window=window) > 0)
        except (RasterioError, OSError) as error:
            raise RasterError(f"{self.part.path}: can't read {_where(window)}: {_cause(error)}") from error
        return None


class GdalHandle:
    """Every file of a `GdalSource`, open in one thread."""

    def __init__(self, source: GdalSource) -> None:
        self.source = source
        self.parts: list[_OpenPart] = []
        try:
            for part in source.parts:
                self.parts.append(_OpenPart(part))
        except BaseException:
            self.close()
            raise
        # Band of the stack -> (file, band of the file's selection).
        self.place = [(p, b) for p, part in enumerate(source.parts) for b in range(len(part.indexes))]

    def close(self) -> None:
        """Close every file."""
        for part in self.parts:
            part.close()
        self.parts = []

    def profile(self) -> Profile:
        """What the stack is."""
        first = self.parts[0]
        dtypes = [open_.dataset.dtypes[i - 1] for open_ in self.parts for i in open_.part.indexes]
        dtype = np.result_type(*[_checked_dtype(self.source.name, name) for name in dtypes])
        nodata = [value for open_ in self.parts for value in open_.nodata]
        crs = first.part.target.crs if first.part.target else first.dataset.crs
        return Profile(
            shape=(len(self.place), first.dataset.height, first.dataset.width),
            dtype=dtype,
            crs=crs,
            transform=first.dataset.transform,
            nodata=_common_nodata(nodata, dtype),
            band_names=_band_names(self.parts),
            block_shape=first.dataset.block_shapes[0],
            colormap=_colormap(first.file) if len(self.place) == 1 else None,
            tags={k: v for k, v in first.file.tags().items() if k not in _FORMAT_TAGS},
        )

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W] in the stack's common dtype."""
        if len(self.parts) == 1:
            return self.parts[0].read(window, bands)
        pieces: dict[int, Array] = {}
        for p, part in enumerate(self.parts):
            wanted = [(k, self.place[b][1]) for k, b in enumerate(bands) if self.place[b][0] == p]
            if wanted:
                data = part.read(window, tuple(b for _, b in wanted))
                pieces.update({k: data[i] for i, (k, _) in enumerate(wanted)})
        return np.stack([pieces[k] for k in range(len(bands))]).astype(self.source.profile.dtype, copy=False)

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data: by nodata value, mask and alpha band."""
        nodata = tuple(self.parts[self.place[b][0]].nodata[self.place[b][1]] for b in bands)
        floating = np.issubdtype(self.source.profile.dtype, np.floating)
        if floating or any(value is not None for value in nodata):
            data = self.read(window, bands) if data is None else data
            valid = not_missing(data, nodata)
        else:
            valid = np.ones((len(bands), window.height, window.width), bool)
        for p in {self.place[b][0] for b in bands}:
            shown = self.parts[p].shown(window)
            if shown is not None:
                valid[[k for k, b in enumerate(bands) if self.place[b][0] == p]] &= shown
        return valid


def open_dataset(path: str) -> DatasetReader:
    """`rasterio.open`, with one clear RasterError for what isn't a readable raster."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path)
    except (RasterioError, OSError) as error:
        raise RasterError(f"{path}: not a raster that can be read: {_cause(error)}") from error
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


def _warp(dataset: DatasetReader, target: Target) -> WarpedVRT:
    crs = dataset.crs or _ANY_CRS
    # Without nodata or alpha the part outside the file would pass for zeros: an alpha band tells them apart.
    flags = dataset.mask_flag_enums[0]
    add_alpha = dataset.nodata is None and MaskFlags.alpha not in flags
    return WarpedVRT(
        dataset,
        src_crs=crs,
        src_transform=dataset.transform,
        crs=target.crs or _ANY_CRS,
        transform=target.transform,
        height=target.height,
        width=target.width,
        resampling=target.resampling,
        add_alpha=add_alpha,
    )


def _checked_dtype(path: str, name: str) -> np.dtype[Any]:
    if name.startswith("complex"):
        raise RasterError(f"{path}: complex pixels ({name}) have no meaning here; split them into real bands")
    return np.dtype(name)


def _common_nodata(values: list[float | None], dtype: np.dtype[Any]) -> float | None:
    """The first value that pixels of the stack can have; where none can, the first all the same."""
    given = [value for value in values if value is not None]
    return next((value for value in given if holds(dtype, value)), given[0] if given else None)


def _band_names(parts: list[_OpenPart]) -> tuple[str, ...]:
    names: list[str] = []
    for open_ in parts:
        stem = open_.part.path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        alone = len(parts) > 1 and len(open_.part.indexes) == 1
        for index in open_.part.indexes:
            given = open_.file.descriptions[index - 1]
            names.append(given or (stem if alone else f"band_{index}"))
    return tuple(names)


def _colormap(dataset: DatasetReader) -> Colormap | None:
    try:
        colors = dataset.colormap(1)
    except ValueError:
        return None
    return {int(value): tuple(color) for value, color in colors.items()}


def _where(window: Window) -> str:
    return (
        f"rows {window.row_off}-{window.row_off + window.height}, "
        f"columns {window.col_off}-{window.col_off + window.width}"
    )


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
