"""Where a scene lies and what its pixels mean: kept, applied or said."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from process_scenes import random_pixels, read, write_scene
from rasterio.control import GroundControlPoint

from bigvision.jobs.process import Options, run_scene
from tiling import open_raster

NETWORK = f"{Path(__file__).with_name('process_networks.py')}:random_net?seed=3&bands=2"
_PARTS = ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")
RPCS = {f"{part}_{kind}": "1" for part in _PARTS for kind in ("OFF", "SCALE")}
RPCS |= {f"{part}_{kind}_COEFF": " ".join(["0.5"] * 20) for part in _PARTS[:2] for kind in ("NUM", "DEN")}


def options(**more: object) -> Options:
    return Options(model=NETWORK, output="logits", dtype="float32", engine="tiles", tile=24, **more)


def test_control_points_and_coefficients_are_those_of_the_scene(tmp_path: Path) -> None:
    """A Sentinel-1 GRD has nothing else."""
    places = [(0.0, 0.0), (0.0, 40.0), (30.0, 0.0), (30.5, 40.0)]
    gcps = [GroundControlPoint(row=r, col=c, x=10 + c / 9, y=50 - r / 9, z=7.5, id=f"{r}") for r, c in places]
    path = tmp_path / "scene.tif"
    write_scene(path, random_pixels((2, 30, 40)), transform=None, crs=None)
    with rasterio.open(path, "r+") as file:
        file.gcps = (gcps, rasterio.CRS.from_epsg(4326))
        file.update_tags(ns="RPC", **RPCS)
    for kind in ("cog", "zarr"):
        target = tmp_path / f"out.{'tif' if kind == 'cog' else 'zarr'}"
        outcome = run_scene((str(path),), target, options(format=kind))
        assert "no CRS" not in outcome.warning
    with rasterio.open(path) as one, rasterio.open(tmp_path / "out.tif") as other:
        assert [p.asdict() for p in one.gcps[0]] == [p.asdict() for p in other.gcps[0]]
        assert one.gcps[1] == other.gcps[1] and one.tags(ns="RPC") == other.tags(ns="RPC")
        assert other.scales[0] == 1.0


def test_a_mask_beside_the_name_of_a_result_hides_nothing(tmp_path: Path) -> None:
    scene, target = tmp_path / "scene.tif", tmp_path / "out.tif"
    write_scene(scene, random_pixels((2, 30, 40)))
    beside = tmp_path / "out.tif.msk"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        write_scene(target, random_pixels((1, 30, 40)))
        with rasterio.open(target, "r+") as file:
            file.write_mask(np.zeros((30, 40), bool))
    target.rename(tmp_path / "away.tif")
    with pytest.raises(ValueError, match=r"out\.tif\.msk would be read as a part of it"):
        run_scene((str(scene),), target, options())
    assert beside.exists()
    beside.rename(tmp_path / "away.tif.msk")
    run_scene((str(scene),), target, options())
    (tmp_path / "away.tif.msk").rename(beside)  # a mask that someone gave the result
    run_scene((str(scene),), target, options(overwrite=True, threshold=0.4))
    assert not beside.exists() and open_raster(target).mask().all()


def test_scale_and_offset_are_applied_when_asked_for_and_named_otherwise(tmp_path: Path) -> None:
    pixels = random_pixels((2, 30, 40), dtype="int16")
    scaled, physical = tmp_path / "scaled.tif", tmp_path / "physical.tif"
    write_scene(scaled, pixels)
    with rasterio.open(scaled, "r+") as file:
        file.scales, file.offsets = (0.01, 0.02), (-1.0, 3.0)
    write_scene(physical, np.stack([pixels[0] * 0.01 - 1, pixels[1] * 0.02 + 3]).astype("float32"))
    plain = run_scene((str(scaled),), tmp_path / "plain.tif", options())
    assert "carry scale and offset (0.01, -1), which are not applied; --unscale applies them" in plain.warning
    told = run_scene((str(scaled),), tmp_path / "unscaled.tif", options(unscale=True))
    assert told.warning == ""
    run_scene((str(physical),), tmp_path / "expected.tif", options())
    assert np.array_equal(read(tmp_path / "unscaled.tif"), read(tmp_path / "expected.tif"))
    assert not np.array_equal(read(tmp_path / "plain.tif"), read(tmp_path / "expected.tif"))
