"""A raster as the network sees it: normalised pixels, zero where there is no data.

Legend: C bands, h and w rows and columns of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.normalising import normalised
from bigvision.jobs.process.options import Options
from tiling import Raster, open_raster


@dataclass(frozen=True)
class Scene:
    """A raster and its normalisation; picklable, read from any thread or process.

    Pixels x become (x / scale - mean) / std; a band without data, and every band of a pixel where one is NaN
    or infinite, becomes 0: the mean.
    """

    raster: Raster
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self.raster.shape

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Normalised pixels float32 [C, h, w] and where the window has data, bool [h, w]."""
        values, missing = self.values(window)
        normal = normalised(values, self.scale, self.mean, self.std)
        if missing.any():
            normal[missing] = 0
        return normal, np.logical_not(missing.all(axis=0))

    def values(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Pixels [C, h, w] in the raster's own units, and where the network gets none, bool [C, h, w]."""
        pixels = self.raster.read(window, masked=True)
        missing: NDArray[np.bool_] = np.ma.getmaskarray(pixels)
        values = np.ma.getdata(pixels)
        if np.issubdtype(values.dtype, np.floating):
            broken = ~np.isfinite(values) & ~_named(values, self.raster.nodata)
            missing = missing | broken.any(axis=0)
            values = np.where(missing, 0, values)
        return values, missing


def open_scene(paths: Sequence[str], options: Options) -> Scene:
    """Open one scene (several files with --stack) as the options ask; ValueError says what doesn't fit."""
    path: Any = paths[0] if len(paths) == 1 else list(paths)
    if len(paths) == 1:
        raster = open_raster(path, bands=options.bands, resolution=options.resolution, aoi=options.aoi)
    else:
        raster = open_raster(path, resolution=options.resolution, aoi=options.aoi)
        raster = raster.select(bands=options.bands) if options.bands else raster
    bands = raster.shape[0]
    if np.issubdtype(raster.dtype, np.complexfloating):
        raise ValueError(f"{raster.name}: complex pixels ({raster.dtype}) can't enter the network")
    return Scene(
        raster,
        options.scale,
        _per_band("mean", options.mean, 0.0, bands, raster.name),
        _per_band("std", options.std, 1.0, bands, raster.name),
    )


def _per_band(
    name: str, values: tuple[float, ...] | None, default: float, bands: int, scene: str
) -> tuple[float, ...]:
    given = (default,) if values is None else values
    if len(given) == 1:
        return given * bands
    if len(given) != bands:
        raise ValueError(f"{scene}: --{name} has {len(given)} values, the scene {bands} bands")
    return given


def _named(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Where a NaN or infinite value is the raster's own nodata value, which goes by band."""
    if nodata is None or np.isfinite(nodata):
        return np.zeros(values.shape, bool)
    return np.isnan(values) if np.isnan(nodata) else values == nodata
