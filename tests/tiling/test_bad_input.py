"""Each of these ends in one sentence that names the file and the value."""

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from tiling import RasterError, open_raster


def test_not_there(tmp_path) -> None:
    with pytest.raises(RasterError, match=r"nowhere\.tif: not a raster that can be read"):
        open_raster(tmp_path / "nowhere.tif")


def test_not_a_raster(tmp_path) -> None:
    path = tmp_path / "notes.tif"
    path.write_text("not a raster at all")
    with pytest.raises(RasterError, match=r"notes\.tif: not a raster that can be read"):
        open_raster(path)


def test_zero_bytes(tmp_path) -> None:
    path = tmp_path / "empty.tif"
    path.touch()
    with pytest.raises(RasterError, match=r"empty\.tif: an empty file \(0 bytes\)"):
        open_raster(path)


def test_an_empty_folder_and_an_empty_list(tmp_path) -> None:
    for name in ("folder", "folder.zarr"):
        (tmp_path / name).mkdir()
        with pytest.raises(RasterError, match=name):
            open_raster(tmp_path / name)
    with pytest.raises(RasterError, match="empty"):
        open_raster([])


@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 64}])
def test_a_truncated_tiff_is_told_on_opening(write_tif, noise, layout: dict) -> None:
    path = write_tif(noise(3, 300, 300), **layout)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(RasterError, match=r"scene\.tif: (truncated: |not a raster)"):
        open_raster(path)


def test_damage_inside_is_told_on_reading_with_the_place(write_tif, noise) -> None:
    path = write_tif(noise(1, 256, 256), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    with rasterio.open(path) as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_1_2", "TIFF", bidx=1))
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 500)
    raster = open_raster(path)
    with pytest.raises(RasterError, match=r"scene\.tif: can't read rows 0-256, columns 0-256"):
        raster.read()


@pytest.mark.parametrize("kind", ["complex64", "complex128", "complex_int16"])
def test_complex_pixels(tmp_path, kind: str) -> None:
    path = tmp_path / "radar.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=4, width=4, dtype=kind, transform=from_origin(0, 4, 1, 1)
    ) as file:
        file.write(np.zeros((1, 4, 4), "complex64"))
    with pytest.raises(RasterError, match=rf"radar\.tif: complex pixels \({kind}\)"):
        open_raster(path)


def test_unknown_resampling_and_resolution(write_tif, noise) -> None:
    path = write_tif(noise())
    with pytest.raises(RasterError, match="'magic' is none of nearest"):
        open_raster(path, resampling="magic")
    for resolution in (0, -5, (10, 0), float("nan")):
        with pytest.raises(RasterError, match="resolution must be positive and finite"):
            open_raster(path, resolution=resolution)
