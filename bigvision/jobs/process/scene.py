"""A raster as the network sees it: normalised pixels, zero where there is no data.

Legend: C bands, h and w rows and columns of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.normalising import normalised
from bigvision.jobs.process.options import Options
from tiling import Raster, open_raster
from tiling.area import Area, find_area

MOST_PIXELS = 2**50  # a hundred times the Earth's land by the metre; activations of more can't be counted


@dataclass(frozen=True)
class Scene:
    """A raster and its normalisation; picklable, read from any thread or process.

    Pixels x become (x / scale - mean) / std; a band without data, and every band of a pixel where one is NaN
    or infinite, becomes 0: the mean.

    raster: all of the scene, as the network sees it, and windows count in it. area: the part that is written.
    """

    raster: Raster
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    area: Area | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self.raster.shape

    @property
    def frame(self) -> Window:
        """The window that the result has: around the area of interest, or all."""
        return Window(0, 0, self.shape[2], self.shape[1]) if self.area is None else self.area.window

    @cached_property
    def written(self) -> Raster:
        """The raster within the frame: the result's grid."""
        return self.raster if self.area is None else self.raster.select(window=self.frame)

    def framed(self, window: Window) -> Window:
        """A window of the scene as one of the frame."""
        left, top = window.col_off - self.frame.col_off, window.row_off - self.frame.row_off
        return Window(left, top, window.width, window.height)

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """Which pixels of a window belong to the area of interest, bool [h, w]."""
        if self.area is None:
            return np.ones((window.height, window.width), bool)
        return self.area.inside(window, self.raster.transform)

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
    how: dict[str, Any] = {"resolution": options.resolution, "unscale": options.unscale}
    if len(paths) == 1:
        raster = open_raster(path, bands=options.bands, **how)
    else:
        raster = open_raster(path, **how)
        raster = raster.select(bands=options.bands) if options.bands else raster
    bands, height, width = raster.shape
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{raster.name}: {height} x {width} are {height * width:.1e} pixels, a scene has at most "
            f"{MOST_PIXELS:.1e}"
        )
    if np.issubdtype(raster.dtype, np.complexfloating):
        raise ValueError(f"{raster.name}: complex pixels ({raster.dtype}) can't enter the network")
    return Scene(
        raster,
        options.scale,
        _per_band("mean", options.mean, 0.0, bands, raster.name),
        _per_band("std", options.std, 1.0, bands, raster.name),
        None if options.aoi is None else find_area(options.aoi, raster.profile, raster.name),
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
