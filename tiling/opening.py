"""`open_raster`: from paths to a `Raster`, choosing the source, the grid and the view."""

from collections.abc import Sequence
from math import ceil, hypot, inf
from os import PathLike, fspath
from pathlib import Path

from affine import Affine
from rasterio.enums import ColorInterp, Resampling

from tiling.area import Geometry, find_area
from tiling.behind import SIDECARS, check_file
from tiling.errors import RasterError, named
from tiling.gdal_source import GdalSource, open_dataset
from tiling.integrity import check_ends
from tiling.raster import Bands, Raster, band_positions
from tiling.resample import ResampledSource, Target
from tiling.source import Profile, Source
from tiling.stack import StackSource
from tiling.unscale import UnscaledSource
from tiling.zarr_source import ZarrSource, is_zarr

_LONGEST = 2**31 - 1  # pixels a side, for GDAL
Address = str | PathLike[str]


def open_raster(
    path: Address | Sequence[Address],
    *,
    bands: Bands = None,
    resolution: float | tuple[float, float] | None = None,
    aoi: Geometry | str | Path | None = None,
    resampling: str = "nearest",
    unscale: bool = False,
) -> Raster:
    """A GeoTIFF, COG, VRT, zarr or other raster as a `Raster`; nothing is read yet.

    path: a file, a URL, or several files to stack band by band on the finest one's grid.
    bands: numbers from 1 or names; by default all but an alpha band, which then counts as the mask.
    resolution: pixel size in CRS units, one number or (x, y); the upper left corner stays.
    aoi: area of interest as GeoJSON in EPSG:4326 (dict, text or path): the raster is clipped to the window
        around it, and pixels whose centre lies outside are masked.
    resampling: how pixels are resampled where grids differ: "nearest", "bilinear", "average", "mode", ...

    unscale: apply each band's scale and offset: pixels are physical values, NaN where there is no data.

    Raises RasterError, naming file and value, for what isn't a raster, is damaged or empty, has complex
    pixels, lacks a band, or doesn't meet the area.
    """
    method = _resampling(resampling)
    paths = [_address(p) for p in ([path] if isinstance(path, (str, PathLike)) else path)]
    if not paths:
        raise RasterError("no file to open: the list of paths is empty")
    with named(", ".join(paths), "not a raster that can be read"):
        source, bands = _source(paths, bands, resolution, method)
        if unscale and source.profile.metadata.scaled:
            source = UnscaledSource(source)
        profile = source.profile
        chosen = None if bands is None else band_positions(source.name, bands, profile.band_names)
        area = find_area(aoi, profile, source.name) if aoi is not None else None
        return Raster(source, bands=chosen, area=area)


def _source(
    paths: list[str], bands: Bands, resolution: float | tuple[float, float] | None, method: Resampling
) -> tuple[Source, Bands]:
    """The source of all files, and the bands that are left to choose of it."""
    if len(paths) > 1:
        source: Source = _stack(paths, method)
    elif is_zarr(paths[0]):
        source = ZarrSource(paths[0])
    else:
        source, bands = _one_file(paths[0], bands), None
    return source if resolution is None else _at_resolution(source, resolution, method), bands


def _one_file(path: str, bands: Bands) -> GdalSource:
    """All bands but alpha, or the chosen ones, which may well be an alpha band."""
    with open_dataset(path) as dataset:
        check_ends(path, dataset)
        names = tuple(name or f"band_{i}" for i, name in enumerate(dataset.descriptions, 1))
        data = [i for i, color in enumerate(dataset.colorinterp, 1) if color != ColorInterp.alpha]
    chosen = tuple(data) or tuple(range(1, len(names) + 1))
    if bands is not None:
        chosen = tuple(i + 1 for i in band_positions(path, bands, names))
    return GdalSource(path, chosen)


def _stack(paths: list[str], method: Resampling) -> StackSource:
    """Every file's bands on the grid of the finest one (the first of equals)."""
    for path in paths:
        if is_zarr(path):
            raise RasterError(
                f"{path}: a zarr store can't be stacked with other files; write it to a COG first"
            )
    sources = [_one_file(path, None) for path in paths]
    profiles = [source.profile for source in sources]
    reference = min(profiles, key=_pixel_area)
    if any(p.crs != reference.crs and (p.crs is None or reference.crs is None) for p in profiles):
        raise RasterError(f"{', '.join(paths)}: some of these files have a CRS and some have none")
    target = _target(reference, reference.transform, reference.shape[1:], method)
    return StackSource(
        tuple(
            source if _same_grid(profile, reference) else ResampledSource(source, target)
            for source, profile in zip(sources, profiles, strict=True)
        )
    )


def _at_resolution(source: Source, resolution: float | tuple[float, float], method: Resampling) -> Source:
    profile = source.profile
    x, y = (resolution, resolution) if isinstance(resolution, (int, float)) else resolution
    if not (0 < x < inf and 0 < y < inf):
        raise RasterError(f"{source.name}: resolution must be positive and finite, got {resolution}")
    size_x, size_y = _pixel_size(profile.transform)
    if (x, y) == (size_x, size_y):
        return source
    # Rounded up, so that nothing of the raster is lost; a hair less than a whole pixel doesn't count.
    sizes = [profile.shape[1] * (size_y / y), profile.shape[2] * (size_x / x)]
    if max(sizes) > _LONGEST:
        told = " x ".join(f"{size:.4g}" for size in sizes)
        raise RasterError(
            f"{source.name}: at a resolution of {resolution} (its own is {size_x:g} x {size_y:g}) it would "
            f"have {told} pixels; a raster has at most {_LONGEST} a side"
        )
    height, width = (max(1, ceil(size - 1e-6)) for size in sizes)
    transform = profile.transform @ Affine.scale(x / size_x, y / size_y)
    target = _target(profile, transform, (height, width), method)
    if isinstance(source, StackSource):
        return StackSource(tuple(_brought(part, target) for part in source.parts))
    if isinstance(source, ZarrSource):
        source = source.coarser(min(x / size_x, y / size_y), method.name)
    return ResampledSource(source, target)


def _brought(part: Source, target: Target) -> ResampledSource:
    """A part on another grid than the stack's: at once, not by way of the stack's."""
    return ResampledSource(part.inner if isinstance(part, ResampledSource) else part, target)


def _address(path: Address) -> str:
    text = fspath(path)
    if "://" in text or text.startswith("/vsi"):
        return text
    file = Path(text)
    for sidecar in SIDECARS:
        check_file(Path(text + sidecar))
    if file.is_file() and file.stat().st_size == 0:
        raise RasterError(f"{text}: an empty file (0 bytes)")
    return text


def _resampling(name: str) -> Resampling:
    try:
        return Resampling[name]
    except KeyError:
        known = ", ".join(method.name for method in Resampling)
        raise RasterError(f"resampling {name!r} is none of {known}") from None


def _target(profile: Profile, transform: Affine, size: tuple[int, ...], method: Resampling) -> Target:
    return Target(profile.crs, transform, size[0], size[1], method)


def _pixel_size(transform: Affine) -> tuple[float, float]:
    return hypot(transform.a, transform.d), hypot(transform.b, transform.e)


def _pixel_area(profile: Profile) -> float:
    """In square CRS units; a stack of files in degrees and in metres is compared at the metre's scale."""
    x, y = _pixel_size(profile.transform)
    metres = 111_320.0 if profile.crs is not None and profile.crs.is_geographic else 1.0
    return x * y * metres**2


def _same_grid(one: Profile, other: Profile) -> bool:
    return (
        one.shape[1:] == other.shape[1:]
        and one.crs == other.crs
        and bool(one.transform.almost_equals(other.transform, 1e-9))
    )
