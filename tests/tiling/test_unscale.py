"""Pixels in physical units."""

import numpy as np
import pytest
import rasterio

from tiling import open_raster, to_cog, to_zarr


@pytest.mark.parametrize("kind", ["tif", "zarr", "stack"])
def test_scale_and_offset_are_applied_band_by_band(write_tif, noise, tmp_path, kind: str) -> None:
    data = noise(2, dtype="int16")
    data[0, :5] = 0
    paths = [write_tif(data[i : i + 1], f"{i}.tif", nodata=0) for i in range(2)]
    for k, path in enumerate(paths):
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets, file.units = [(0.0001,), (1,)][k], [(-0.1,), (0,)][k], ("K",)
    address = paths
    if kind != "stack":
        address = tmp_path / f"both.{kind}"
        (to_cog if kind == "tif" else to_zarr)(open_raster(paths), address)
    raster = open_raster(address, unscale=True)
    expected = np.where(data == 0, np.nan, [data[0] * 0.0001 - 0.1, data[1]])
    assert raster.dtype == np.float32 and not raster.profile.metadata.scaled
    assert np.array_equal(raster.read(), expected.astype("float32"), equal_nan=True)
    assert np.array_equal(np.ma.getmaskarray(raster.read(masked=True)), data == 0)
    assert raster.profile.metadata.bands[0].unit == "K"
    assert np.array_equal(open_raster(address).read(), data)
    copy = to_cog(raster, tmp_path / "physical.tif")
    assert np.array_equal(copy.read(), raster.read(), equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "wide"), [("uint16", False), ("float32", False), ("int32", True), ("float64", True)]
)
def test_wide_pixels_are_float64(write_tif, kind: str, wide: bool) -> None:
    path = write_tif(np.full((1, 4, 5), 7, kind))
    assert open_raster(path, unscale=True).dtype == kind  # nothing to apply
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.1,), (3e7,)
    assert open_raster(path, unscale=True).dtype == ("float64" if wide else "float32")
    assert open_raster(path, unscale=True).read()[0, 0, 0] == (np.float64 if wide else np.float32)(
        7 * 0.1 + 3e7
    )
