"""An area of interest is about what is written: inside, the result is that of the whole scene."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from process_networks import random_net
from process_scenes import TRANSFORM, random_pixels, read, whole_image, write_scene
from rasterio.features import geometry_mask
from rasterio.windows import Window

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.scene import open_scene
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
SHAPE = (3, 131, 150)


def polygon(*points: tuple[float, float]) -> dict[str, Any]:
    """A ring through (column, row) places of the scene."""
    ring = [list(TRANSFORM @ point) for point in (*points, points[0])]
    crs = {"type": "name", "properties": {"name": "EPSG:32633"}}
    return {"type": "Polygon", "coordinates": [ring], "crs": crs}


SLANTED = polygon((50, 40), (103, 45), (97, 92), (61, 88))
CORNER = polygon((110, 100), (150, 100), (150, 131), (110, 131))


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = random_pixels(SHAPE, 4)
    pixels[:, 60:75, 40:70] = 0
    return write_scene(tmp_path / "scene.tif", pixels, nodata=0)


def aoi_file(tmp_path: Path, area: dict[str, Any]) -> Path:
    path = tmp_path / "aoi.geojson"
    path.write_text(json.dumps(area))
    return path


def masked(path: Path, like: Path, area: dict[str, Any]) -> np.ndarray:
    """A whole result cut to the frame of another, NaN outside of the area."""
    with rasterio.open(like) as cut, rasterio.open(path) as whole:
        left, top = (round(v) for v in ~whole.transform @ (cut.transform.c, cut.transform.f))
        pixels = whole.read(window=Window(left, top, cut.width, cut.height))
        inside = geometry_mask([area], (cut.height, cut.width), cut.transform, invert=True)
    return np.where(inside, pixels, np.nan)


def options(**more: Any) -> Options:
    chosen = {"model": f"{NETWORKS}:random_net?seed=6", "output": "logits", "dtype": "float32"} | more
    return Options(**chosen)


@pytest.mark.parametrize("area", [SLANTED, CORNER], ids=["slanted", "corner"])
@pytest.mark.parametrize(
    "more",
    [
        {"engine": "tiles", "tile": 24},
        {"engine": "stream", "tile": 32},
        {"engine": "stream", "model": f"{NETWORKS}:gated_net", "tile": 32},
        {"engine": "tiles", "model": f"{NETWORKS}:pooling_net"},
        {"engine": "tiles", "model": f"{NETWORKS}:branching_net?seed=6", "tile": 16},
    ],
    ids=["tiles", "stream", "statistics", "whole", "probed"],
)
def test_inside_the_area_the_result_is_the_whole_scenes(
    scene: Path, tmp_path: Path, more: dict[str, Any], area: dict[str, Any]
) -> None:
    chosen = options(**more)
    outcome = run_scene((str(scene),), tmp_path / "whole.tif", chosen)
    cut = options(**more, aoi=aoi_file(tmp_path, area))
    found = run_scene((str(scene),), tmp_path / "cut.tif", cut)
    assert outcome.plan is not None and found.plan is not None
    assert outcome.plan.exactness == found.plan.exactness == "exact"
    assert found.pixels < outcome.pixels / 4
    one, other = read(tmp_path / "cut.tif"), masked(tmp_path / "whole.tif", tmp_path / "cut.tif", area)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(other)))
    assert np.isfinite(one).any()


def test_it_is_the_whole_image_too(scene: Path, tmp_path: Path) -> None:
    """Not only another run of ours."""
    model = random_net(6)
    run_scene((str(scene),), tmp_path / "cut.tif", options(aoi=aoi_file(tmp_path, CORNER)))
    whole = whole_image(model, read(scene).astype(np.float32), model.stride)[:, 100:, 110:]
    np.testing.assert_allclose(read(tmp_path / "cut.tif"), whole, rtol=0, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("engine", ["tiles", "stream"])
def test_beyond_the_halo_nothing_is_read(
    scene: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigvision.jobs.process.scene import Scene

    seen = np.zeros(SHAPE[1:], bool)
    read_scene = Scene.read

    def watched(self: Scene, window: Window) -> Any:
        seen[window.toslices()] = True
        return read_scene(self, window)

    monkeypatch.setattr(Scene, "read", watched)
    outcome = run_scene(
        (str(scene),), tmp_path / "cut.tif", options(engine=engine, aoi=aoi_file(tmp_path, CORNER))
    )
    assert outcome.plan is not None
    reach = outcome.plan.halo + outcome.plan.stride
    assert seen[100:, 110:].all() and not seen[: 100 - reach].any() and not seen[:, : 110 - reach].any()


@pytest.mark.parametrize("threshold", ["", "threshold = 0.9\n"])
def test_a_routed_area_is_that_of_the_routed_scene(scene: Path, tmp_path: Path, threshold: str) -> None:
    route = tmp_path / "route.toml"
    route.write_text(
        f'region = 16\ngate = "entropy"\nbudget = 0.4\n{threshold}[cheap]\n'
        f'model = "{NETWORKS}:random_net?seed=5"\n'
    )
    run_scene((str(scene),), tmp_path / "whole.tif", options(route=route))
    chosen = options(route=route, aoi=aoi_file(tmp_path, SLANTED))
    run_scene((str(scene),), tmp_path / "cut.tif", chosen)
    one, other = read(tmp_path / "cut.tif"), masked(tmp_path / "whole.tif", tmp_path / "cut.tif", SLANTED)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(other)))
    with rasterio.open(tmp_path / "cut.route.tif") as a, rasterio.open(tmp_path / "whole.route.tif") as b:
        assert (a.read() == b.read()).all() and a.transform == b.transform


@pytest.mark.parametrize("model", ["random_net?seed=6", "gated_net"])
@pytest.mark.slow
def test_a_revisit_copies_within_the_area(scene: Path, tmp_path: Path, model: str) -> None:
    """A change outside of the area, but within the halo, is seen; one far away is not, but for statistics."""
    chosen = options(
        model=f"{NETWORKS}:{model}", aoi=aoi_file(tmp_path, SLANTED), engine="stream", tile=16, format="zarr"
    )
    run_scene((str(scene),), tmp_path / "first.zarr", chosen)
    pixels = read(scene)
    for name, place in (("far", (0, 0)), ("near", (39, 60))):
        changed = pixels.copy()
        changed[:, place[0], place[1]] = 7
        visit = write_scene(tmp_path / f"{name}.tif", changed, nodata=0)
        again = run_scene(
            (str(visit),),
            tmp_path / f"{name}.zarr",
            options(
                model=chosen.model,
                aoi=chosen.aoi,
                engine="stream",
                tile=16,
                format="zarr",
                previous=tmp_path / "first.zarr",
            ),
        )
        if model == "gated_net":
            assert again.computed == again.pixels
        else:
            assert (again.computed > 0) == (name == "near") and again.computed < again.pixels
        run_scene((str(visit),), tmp_path / f"{name}-new.zarr", chosen)
        one, other = (open_raster(tmp_path / f"{stem}.zarr").read() for stem in (name, f"{name}-new"))
        assert one.tobytes() == other.tobytes()


def test_a_scene_knows_its_frame(scene: Path, tmp_path: Path) -> None:
    opened = open_scene([str(scene)], options(aoi=aoi_file(tmp_path, CORNER)))
    assert opened.shape == SHAPE and opened.written.shape == (3, 31, 40)
    assert opened.frame == Window(110, 100, 40, 31)
    assert opened.framed(Window(112, 105, 7, 8)) == Window(2, 5, 7, 8)
    inside = opened.inside(Window(100, 90, 50, 41))
    assert not inside[:10].any() and not inside[:, :10].any() and inside[10:, 10:].all()
