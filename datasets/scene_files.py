"""Synthetic scenes as files: block by block into zarr or GeoTIFF, so that no size is too large."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.scenes import BANDS, CLASSES, COLOURS, NODATA, Scene
from tiling import Raster, TileGrid, create_zarr, open_raster
from tiling.publish import begin, check_free, discard, followed, publish
from tiling.replaceable import not_a_tiff

LABEL_NODATA = 255
Block = Callable[[Window], NDArray[np.uint8]]


def write_scene(
    scene: Scene,
    path: str | PathLike[str],
    *,
    labels: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    pyramid: str | None = "auto",
) -> Raster:
    """Write a scene's image, or its `labels`, to a `.zarr` store or a `.tif`; returns it opened.

    The image has the bands of BANDS and nodata 0; labels are one band of class numbers with nodata 255 and
    a colour table. A few blocks a worker are in memory at once. `pyramid` is that of `ZarrWriter.publish`; a
    GeoTIFF gets none.

    Raises:
        ValueError: for another suffix; RasterError where something stands at `path` without `overwrite`.
    """
    target = Path(path)
    if target.suffix not in (".zarr", ".tif", ".tiff"):
        raise ValueError(f"{target}: a scene is written as .zarr, .tif or .tiff, not {target.suffix!r}")
    write = _write_zarr if target.suffix == ".zarr" else _write_tiff
    return write(scene, target, labels, overwrite, workers, pyramid)


def _block(scene: Scene, labels: bool) -> Block:
    def image(window: Window) -> NDArray[np.uint8]:
        return scene.read(window.row_off, window.col_off, window.height, window.width)[0]

    def classes(window: Window) -> NDArray[np.uint8]:
        return scene.labels(window.row_off, window.col_off, window.height, window.width)[None]

    return classes if labels else image


def _write_zarr(
    scene: Scene, path: Path, labels: bool, overwrite: bool, workers: int, pyramid: str | None
) -> Raster:
    block = _block(scene, labels)
    writer = create_zarr(
        path,
        (1, scene.height, scene.width) if labels else scene.shape,
        np.uint8,
        crs=scene.crs,
        transform=scene.transform,
        nodata=LABEL_NODATA if labels else NODATA,
        band_names=("class",) if labels else BANDS,
        colormap=_colormap() if labels else None,
        tags={"classes": ", ".join(CLASSES)},
        overwrite=overwrite,
    )
    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda tile: writer.write(block(tile.core), tile.core), writer.grid()))
        return writer.publish(pyramid=pyramid)
    except BaseException:
        writer.discard()
        raise


def _write_tiff(
    scene: Scene, path: Path, labels: bool, overwrite: bool, workers: int, pyramid: str | None
) -> Raster:
    path = followed(path)
    check_free(path, overwrite, not_a_tiff)
    block = _block(scene, labels)
    work = begin(path)
    staging = work / "scene.tif"
    grid = TileGrid(scene.height, scene.width, 1024)
    try:
        with (
            rasterio.open(staging, "w", **_tiff_profile(scene, labels)) as file,
            ThreadPoolExecutor(workers) as pool,
        ):
            _describe(file, labels)
            for batch in range(0, len(grid), 4 * workers):
                tiles = grid[batch : batch + 4 * workers]
                for tile, data in zip(tiles, pool.map(lambda tile: block(tile.core), tiles), strict=True):
                    file.write(data, window=tile.core)
        publish(staging, path, replace=overwrite)
    finally:
        discard(work)
    return open_raster(path)


def _tiff_profile(scene: Scene, labels: bool) -> dict[str, object]:
    return {
        "driver": "GTiff",
        "count": 1 if labels else len(BANDS),
        "height": scene.height,
        "width": scene.width,
        "dtype": "uint8",
        "crs": scene.crs,
        "transform": scene.transform,
        "nodata": LABEL_NODATA if labels else NODATA,
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "zstd",
        "bigtiff": "if_safer",
        # Four bytes would pass for red, green, blue and alpha.
        "photometric": "minisblack",
    }


def _describe(file: rasterio.io.DatasetWriter, labels: bool) -> None:
    for number, name in enumerate(("class",) if labels else BANDS, 1):
        file.set_band_description(number, name)
    file.update_tags(classes=", ".join(CLASSES))
    if labels:
        file.write_colormap(1, _colormap())


def _colormap() -> dict[int, tuple[int, int, int, int]]:
    return {label: (*colour, 255) for label, colour in enumerate(COLOURS)}
