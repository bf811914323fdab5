"""What GDAL's own COG driver carries over is carried over: by ingest, by export, by both."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from tiling import create_zarr, open_raster, to_cog, to_zarr

SIZE = (60, 80)
GRID = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 5_000_000)}
RPCS = {
    **{f"{part}_SCALE": "1" for part in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")},
    **{f"{part}_OFF": "1" for part in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")},
    **{f"{part}_{kind}_COEFF": " ".join(f"{k / 8}" for k in range(20))
       for part in ("LINE", "SAMP") for kind in ("NUM", "DEN")},
}  # fmt: skip


def points(random: np.random.Generator) -> list[GroundControlPoint]:
    places = [(row, col) for row in (0, 30, 60) for col in (0, 40, 80)]
    heights = random.integers(0, 99, len(places)).astype(float)
    return [
        GroundControlPoint(row=row + 0.5, col=col, x=10 + col / 9, y=50 - row / 7, z=z, id=f"{row}-{col}")
        for (row, col), z in zip(places, heights, strict=True)
    ]


def random_file(seed: int, path: Path) -> Path:
    """A GeoTIFF with any of the texts and numbers that one can hold."""
    random = np.random.default_rng(seed)
    bands, dtype = int(random.integers(1, 5)), str(random.choice(["uint8", "int16", "uint16", "float32"]))
    some = lambda: bool(random.random() < 0.6)  # noqa: E731
    placed = [GRID, {}, {"gcps": points(random), "crs": "EPSG:4326"}, {"crs": "EPSG:4326"}][
        random.integers(4)
    ]
    about = {"photometric": "minisblack", "alpha": "no", "nodata": 0 if some() else None}
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=SIZE[0], width=SIZE[1], dtype=dtype, **about, **placed
    ) as file:
        if some():
            file.update_tags(AREA_OR_POINT=str(random.choice(["Point", "Area"])))
        if some():
            file.update_tags(
                TIFFTAG_SOFTWARE="a camera", TIFFTAG_DATETIME="2024:01:02 03:04:05", season="dry & cold"
            )
        if some():
            file.scales = random.integers(1, 9, bands) / 8
            file.offsets = random.integers(-9, 9, bands) / 4
        if some():
            file.units = ["m/s", "K", "µm", "°"][:bands]
        if some():
            for index in range(1, bands + 1):
                file.update_tags(index, WAVELENGTH=f"{index} µm", STATISTICS_MEAN="3.5")
                file.set_band_description(index, f"band <{index}>")
        if some():
            file.update_tags(ns="RPC", **RPCS)
        if some():
            colors = [ColorInterp.blue, ColorInterp.nir, ColorInterp.undefined, ColorInterp.red]
            file.colorinterp = colors[:bands]
        if bands == 1 and dtype == "uint8" and some():
            file.write_colormap(1, {0: (1, 2, 3, 255), 7: (9, 8, 7, 255)})
        file.write(random.integers(1, 9, (bands, *SIZE)).astype(dtype))
    return path


def told(path: Path | str) -> dict[str, object]:
    """Everything that a copy should keep, by rasterio alone."""
    with rasterio.open(path) as file:
        gcps, crs = file.gcps
        tags = file.tags()
        tags.pop("OVR_RESAMPLING_ALG", None)
        try:
            colormap = file.colormap(1)
        except ValueError:
            colormap = None
        return {
            "crs": file.crs,
            "transform": file.transform,
            "gcps": [[p.row, p.col, p.x, p.y, p.z] for p in gcps],
            "gcp_crs": crs if gcps else None,
            "rpcs": file.tags(ns="RPC"),
            "scales": file.scales,
            "offsets": file.offsets,
            "units": file.units,
            "tags": tags | {"AREA_OR_POINT": tags.get("AREA_OR_POINT", "Area")},
            "band tags": [file.tags(i) for i in file.indexes],
            "descriptions": file.descriptions,
            "colors": file.colorinterp,
            "colormap": colormap,
            "nodata": file.nodata,
        }


@pytest.mark.parametrize("seed", [*range(14), 127])  # 127: three bytes that are no red, green and blue
def test_copies_tell_what_a_copy_by_gdal_tells(tmp_path, seed: int) -> None:
    scene = random_file(seed, tmp_path / "scene.tif")
    rasterio.shutil.copy(scene, tmp_path / "gdal.tif", driver="COG")
    oracle = told(tmp_path / "gdal.tif")
    raster = open_raster(scene)
    to_cog(raster, tmp_path / "ours.tif")
    store = to_zarr(raster, tmp_path / "s.zarr")
    to_cog(open_raster(store.name), tmp_path / "back.tif")
    for name in ("ours.tif", "back.tif"):
        copy = told(tmp_path / name)
        for key, value in oracle.items():
            if key == "descriptions":  # bands without one are called by their number
                value = tuple(text or f"band_{k}" for k, text in enumerate(value, 1))
            assert copy[key] == value, (name, key)


def test_units_are_cf_attributes_of_a_store_and_are_read_from_others(tmp_path, write_tif, noise) -> None:
    import zarr

    path = write_tif(noise(2, dtype="int16"))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets, file.units = (0.01, 0.01), (273.15, 273.15), ("K", "K")
    to_zarr(open_raster(path), tmp_path / "s.zarr")
    attributes = zarr.open_array(tmp_path / "s.zarr" / "0", mode="r").attrs
    assert (attributes["scale_factor"], attributes["add_offset"], attributes["units"]) == (0.01, 273.15, "K")
    plain = zarr.create_array(tmp_path / "other.zarr", shape=(4, 5), dtype="int16")
    plain.attrs.update({"scale_factor": 0.5, "add_offset": -1, "units": "m"})
    band = open_raster(tmp_path / "other.zarr").profile.metadata.bands[0]
    assert (band.scale, band.offset, band.unit) == (0.5, -1.0, "m")


def test_control_points_and_coefficients_follow_a_window_and_a_resolution(tmp_path) -> None:
    scene = tmp_path / "scene.tif"
    given = points(np.random.default_rng(0))
    with rasterio.open(
        scene, "w", driver="GTiff", count=1, height=60, width=80, dtype="uint8", gcps=given, crs="EPSG:4326"
    ) as file:
        file.write(np.ones((1, 60, 80), "uint8"))
        file.update_tags(ns="RPC", **RPCS | {"LINE_OFF": "30", "SAMP_OFF": "39.5", "LINE_SCALE": "30"})
    part = open_raster(scene).select(window=Window(10, 20, 30, 30)).profile.metadata
    assert [(p.row, p.col) for p in part.gcps] == [(p.row - 20, p.col - 10) for p in given]
    assert float(part.rpcs["LINE_OFF"]) == 10 and float(part.rpcs["SAMP_OFF"]) == 29.5
    half = open_raster(scene, resolution=2).profile.metadata
    assert [(p.row, p.col) for p in half.gcps] == [(p.row / 2, p.col / 2) for p in given]
    # The centre of line 30 is a quarter of a coarse line below the centre of coarse line 14.75.
    assert float(half.rpcs["LINE_OFF"]) == 14.75 and float(half.rpcs["LINE_SCALE"]) == 15


def test_statistics_of_all_pixels_are_not_told_of_some(write_tif, noise) -> None:
    path = write_tif(noise(1))
    with rasterio.open(path, "r+") as file:
        file.update_tags(1, STATISTICS_MEAN="3", SENSOR="msi")
    for raster in (open_raster(path, resolution=20), open_raster(path).select(window=Window(0, 1, 5, 5))):
        assert raster.profile.metadata.bands[0].tags == {"SENSOR": "msi"}
    assert "STATISTICS_MEAN" in open_raster(path).profile.metadata.bands[0].tags


def test_a_store_can_be_made_with_metadata(tmp_path, write_tif, noise) -> None:
    about = open_raster(random_file(2, tmp_path / "a.tif")).profile.metadata.place()
    with create_zarr(tmp_path / "s.zarr", (1, 4, 4), "uint8", metadata=about):
        pass
    kept = open_raster(tmp_path / "s.zarr").profile.metadata
    assert kept.rpcs == about.rpcs and len(kept.gcps) == len(about.gcps)
