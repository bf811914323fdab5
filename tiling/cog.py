"""Cloud-optimised GeoTIFFs of rasters larger than memory.

GDAL's COG driver copies from a dataset it can read in any order, so the pixels first go, row of blocks by row
of blocks, into a compressed tiled TIFF beside the destination.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from tiling.errors import RasterError
from tiling.grid import TileGrid
from tiling.integrity import check_all
from tiling.memory import CACHE_BYTES, gdal_cache
from tiling.metadata import Metadata, with_gcps, write_metadata
from tiling.missing import value_for
from tiling.opening import open_raster
from tiling.publish import begin, check_free, discard, followed, publish, writing
from tiling.raster import Raster
from tiling.replaceable import check_alone, check_result, drop_sidecars, not_a_tiff
from tiling.source import Array, Colormap, holds

_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
_COMPRESS = ("none", "deflate", "zstd", "lzw", "lzma", "lerc", "lerc_deflate", "lerc_zstd", "jpeg", "webp")
_OVERVIEWS = ("nearest", "average", "mode", "bilinear", "cubic", "cubicspline", "lanczos", "rms")
_PREDICTED = ("deflate", "lzw", "zstd")


@dataclass(frozen=True)
class _Plan:
    """How a raster becomes a COG: what differs from the source, settled before any work."""

    dtype: np.dtype[Any]
    nodata: float | None
    band_names: tuple[str, ...]
    colormap: Colormap | None
    tags: dict[str, str]
    compress: str
    level: int | None
    blocksize: int
    resampling: str
    threads: int
    masked: bool


def to_cog(
    raster: Raster,
    path: str | PathLike[str],
    *,
    compress: str = "deflate",
    level: int | None = None,
    blocksize: int = 512,
    overviews: str = "auto",
    dtype: str | None = None,
    nodata: float | None = None,
    band_names: tuple[str, ...] | None = None,
    colormap: Colormap | None = None,
    tags: dict[str, str] | None = None,
    cache: int = CACHE_BYTES,
    threads: int | None = None,
    scratch: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[float], object] | None = None,
) -> Raster:
    """Write a raster of any size as a COG with overviews; returns it opened.

    compress: "deflate", "zstd", "lzw", "lerc", "none", ... (a predictor is added where it helps).
    overviews: how they are resampled, "average", "nearest", "mode", ...; "auto" takes "mode" where there is a
        colour table, else "average".
    dtype: convert, with values rounded and clipped to its limits; by default the raster's.
    nodata, band_names, colormap, tags: instead of (tags: in addition to) the raster's own.
    cache: bytes that GDAL may keep of the pixels in memory. threads: that compress, by default one a core.
    progress: called with the fraction done, 0 to 1.

    scratch: a folder of the same file system for unfinished work, by default that of `path`.

    BIGTIFF is used where the size asks for it. Needs room in `scratch` for a second, compressed copy.
    The file appears under its name when it is complete. overwrite: replace a TIFF that stands there, never
    anything else. Raises RasterError for what a COG can't hold, and where `path` is, by whatever name, a file
    that the raster is read from.
    """
    check_result(Path(path), raster, not_a_tiff, overwrite)
    target, colors = followed(Path(path)), colormap or raster.colormap
    kind = np.dtype("uint8" if raster.dtype == bool and dtype is None else dtype or raster.dtype)
    plan = _Plan(
        dtype=kind,
        nodata=nodata,
        band_names=band_names or raster.band_names,
        colormap=colors,
        tags={**raster.tags, **(tags or {})},
        compress=compress.lower(),
        level=level,
        blocksize=blocksize,
        resampling=("mode" if colors else "average") if overviews == "auto" else overviews.lower(),
        threads=threads or os.cpu_count() or 1,
        masked=False,
    )
    check_alone(target)
    _check(plan, raster, target)
    with gdal_cache(cache):
        value = value_for(raster, kind, convert) if nodata is None else nodata
    plan = replace(plan, nodata=value, masked=raster.has_mask and value is None and raster.shares_mask)
    _check_nodata(plan, target)
    folder = Path(scratch) if scratch else target.parent
    with gdal_cache(cache):
        _make(plan, raster, target, folder, overwrite, progress or _silent)
    return open_raster(target)


def _check(plan: _Plan, raster: Raster, target: Path) -> None:
    bands, kind = raster.shape[0], plan.dtype
    if kind.name not in _DTYPES:
        raise RasterError(f"{target}: a COG can't hold {kind} pixels; convert to one of {', '.join(_DTYPES)}")
    _check_nodata(plan, target)
    if len(plan.band_names) != bands:
        raise RasterError(f"{target}: {len(plan.band_names)} band names for {bands} bands")
    if plan.colormap and (bands != 1 or kind.name not in ("uint8", "uint16")):
        raise RasterError(f"{target}: a colour table goes with one uint8 or uint16 band, not {bands} {kind}")
    if plan.blocksize < 16 or plan.blocksize % 16:
        raise RasterError(f"{target}: TIFF blocks are multiples of 16 pixels, got {plan.blocksize}")
    if plan.compress not in _COMPRESS:
        raise RasterError(f"{target}: compress {plan.compress!r} is none of {', '.join(_COMPRESS)}")
    if plan.resampling not in _OVERVIEWS:
        raise RasterError(f"{target}: overviews {plan.resampling!r} is none of {', '.join(_OVERVIEWS)}")


def _check_nodata(plan: _Plan, target: Path) -> None:
    if plan.nodata is not None and not holds(plan.dtype, plan.nodata):
        raise RasterError(f"{target}: nodata {plan.nodata} is no {plan.dtype} value")


def _make(
    plan: _Plan,
    raster: Raster,
    target: Path,
    folder: Path,
    overwrite: bool,
    progress: Callable[[float], object],
) -> None:
    with writing(target), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        # GDAL keeps unfinished overviews and masks beside the file that it writes: all in one folder.
        work = begin(folder / target.name)
        try:
            draft, final = work / "draft.tif", work / "final.tif"
            _write_draft(raster, draft, plan, progress)
            _check_written(draft, target)
            about = raster.profile.metadata
            # As in GDAL's own copies, a grid goes before control points.
            placed = about.gcps and raster.transform == Affine.identity()
            _copy(_with_gcps(draft, about) if placed else draft, final, plan)
            _check_written(final, target)
            check_free(target, overwrite, not_a_tiff)
            publish(final, target, replace=overwrite)
            drop_sidecars(target)
        finally:
            discard(work)
    progress(1.0)


def _write_draft(raster: Raster, draft: Path, plan: _Plan, progress: Callable[[float], object]) -> None:
    """Every pixel and all metadata into a tiled TIFF, one window of whole blocks after the other."""
    bands, height, width = raster.shape
    options: dict[str, Any] = {"compress": "deflate", "zlevel": 1, "num_threads": plan.threads}
    options |= {"bigtiff": "IF_SAFER", "interleave": "band" if bands > 4 else "pixel"}
    # Four uint8 bands would pass for colours with alpha, and near infrared for transparency.
    colors = [band.color for band in raster.profile.metadata.bands] or ["red", "green", "blue"]
    rgb = colors == ["red", "green", "blue"] and bands == 3 and plan.dtype == "uint8"
    options |= {"photometric": "RGB" if rgb else "MINISBLACK", "alpha": "NO"}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            draft,
            "w",
            driver="GTiff",
            count=bands,
            height=height,
            width=width,
            dtype=plan.dtype.name,
            crs=raster.crs,
            transform=raster.transform,
            nodata=plan.nodata,
            tiled=True,
            blockxsize=plan.blocksize,
            blockysize=plan.blocksize,
            **options,
        ) as file,
    ):
        file.update_tags(**plan.tags)
        write_metadata(file, _fitting(raster.profile.metadata, plan))
        for number, name in enumerate(plan.band_names, 1):
            file.set_band_description(number, name)
        if plan.colormap:
            file.write_colormap(1, plan.colormap)
        windows = TileGrid(height, width, _window_size(raster, plan))
        for done, tile in enumerate(windows, 1):
            _write_window(raster, file, tile.core, plan)
            # The copy that follows takes about as long as the draft.
            progress(0.5 * done / len(windows))


def _fitting(about: Metadata, plan: _Plan) -> Metadata:
    """A palette is none without its colours."""
    colors = [band.color if band.color != "palette" or plan.colormap else "gray" for band in about.bands]
    return replace(about, bands=tuple(replace(b, color=c) for b, c in zip(about.bands, colors, strict=True)))


def _with_gcps(draft: Path, about: Metadata) -> Path:
    vrt = draft.with_suffix(".vrt")
    rasterio.shutil.copy(draft, vrt, driver="VRT")
    vrt.write_text(with_gcps(vrt.read_text(), about))
    return vrt


def _write_window(raster: Raster, file: Any, window: Window, plan: _Plan) -> None:
    if plan.nodata is not None and _refills(raster, plan):
        pixels = np.ma.asarray(raster.read(window, masked=True))
        missing = np.ma.getmaskarray(pixels)
        data = convert(pixels.data, plan.dtype)
        if not missing.all() and (lost := ((data == plan.nodata) & ~missing).sum()):
            raise RasterError(
                f"{raster.name}: {lost} pixels with data in {window} are {plan.nodata:g} as {plan.dtype}, "
                "nodata; give another value for it"
            )
        data = np.where(missing, plan.dtype.type(plan.nodata), data)
        file.write(data, window=window)
        return
    data = raster.read(window)
    file.write(convert(data, plan.dtype), window=window)
    if plan.masked:
        file.write_mask(raster.mask(window, data=data), window=window)


def _refills(raster: Raster, plan: _Plan) -> bool:
    """Whether missing pixels, band by band, take the nodata value only here."""
    loses_nan = np.issubdtype(raster.dtype, np.floating) and not np.issubdtype(plan.dtype, np.floating)
    return raster.has_mask or plan.nodata != raster.nodata or loses_nan


def convert(data: Array, dtype: np.dtype[Any]) -> Array:
    """`data` as `dtype`: rounded and clipped to the limits of whole numbers, where NaN becomes 0."""
    if data.dtype == dtype or np.can_cast(data.dtype, dtype, "safe"):
        return data.astype(dtype, copy=False)
    if np.issubdtype(dtype, np.floating):
        return data.astype(dtype)
    info = np.iinfo(dtype)
    if np.issubdtype(data.dtype, np.floating):
        data = np.rint(np.nan_to_num(data, nan=0.0, posinf=info.max, neginf=info.min))
    clipped: Array = np.clip(data, info.min, info.max).astype(dtype)
    return clipped


def _window_size(raster: Raster, plan: _Plan) -> tuple[int, int]:
    """Whole blocks, as wide as possible within 32 MiB, because sources and TIFFs store rows together."""
    budget = 32 * 2**20 // (raster.shape[0] * max(raster.dtype.itemsize, plan.dtype.itemsize))
    block = plan.blocksize
    columns = min(-(-raster.width // block), max(1, budget // block**2))
    rows = max(1, budget // (block**2 * columns))
    return rows * block, columns * block


def _copy(draft: Path, final: Path, plan: _Plan) -> None:
    options: dict[str, Any] = {
        "compress": plan.compress.upper(),
        "blocksize": plan.blocksize,
        "bigtiff": "IF_SAFER",
        "overview_resampling": plan.resampling.upper(),
        "overview_compress": plan.compress.upper(),
        "num_threads": plan.threads,
    }
    if plan.level is not None:
        options["level"] = plan.level
    if plan.compress in _PREDICTED and not plan.colormap:
        options["predictor"] = "YES"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, CPL_TMPDIR=str(final.parent)):
        rasterio.shutil.copy(draft, final, driver="COG", **options)


def _check_written(path: Path, target: Path) -> None:
    with rasterio.open(path) as file:
        check_all(str(target), file)


def _silent(fraction: float) -> None:
    """Progress that nobody asked for."""
