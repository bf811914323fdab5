"""`bigvision process --route` and `--previous` on small scenes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.crs import CRS

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process import routed as routed_module
from bigvision.jobs.process.route_state import UNSURE, RouteState
from bigvision.jobs.process.run import Watcher
from bigvision.models.spec import load_model
from bigvision.routing.boxes import Box
from bigvision.routing.record import load_record
from tiling import open_raster

FULL = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=8"
CHEAP = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=4&depth=1"
SIZE = (130, 150)


def write(path: Path, pixels: np.ndarray, left: float = 0.0) -> str:
    with rasterio.open(
        path, "w", driver="GTiff", height=SIZE[0], width=SIZE[1], count=2, dtype="uint8", nodata=0,
        crs=CRS.from_epsg(26914), transform=Affine(5.0, 0, 500.0 + left, 0, -5.0, 900.0),
    ) as file:  # fmt: skip
        file.write(pixels)
    return str(path)


@pytest.fixture
def pixels() -> np.ndarray:
    found = np.random.default_rng(0).integers(1, 256, (2, *SIZE)).astype(np.uint8)
    found[:, :64, :70] = 0
    return found


def options(folder: Path, budget: float) -> Options:
    route = folder / "ROUTE.toml"
    route.write_text(f'region = 32\nbudget = {budget}\n[cheap]\nmodel = "{CHEAP}"\n')
    return Options(model=FULL, scale=255.0, dtype="float32", output="logits", format="zarr", route=route)


def whole(model: str, pixels: np.ndarray, stride: int) -> np.ndarray:
    image = torch.from_numpy(pixels / np.float32(255.0)).float()
    padded = torch.nn.functional.pad(image, (0, -SIZE[1] % stride, 0, -SIZE[0] % stride))
    with torch.no_grad():
        return load_model(model)(padded[None])[0, :, : SIZE[0], : SIZE[1]].numpy()


def test_a_routed_scene_is_exact_in_each_region_and_says_where_it_went(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    scene, target = write(tmp_path / "scene.tif", pixels), tmp_path / "out.zarr"
    outcome = run_scene((scene,), target, options(tmp_path, 0.25))
    record = load_record(tmp_path / "out.route.tif")
    data = record.expert >= 0
    full = int(data.sum()) // 4
    empty = 2 * 2  # of 5 x 5 regions of 32 px: the corner of 64 x 70 px without data
    assert record.counts() == {"cheap": 25 - empty - full, "full": full, "nodata": empty}
    assert f"full {full} (" in outcome.routed and "% of the full network everywhere" in outcome.routed
    assert (tmp_path / "out.route.png").read_bytes().startswith(b"\x89PNG")
    found = open_raster(target).read()
    chosen = record.expert.repeat(32, 0).repeat(32, 1)[: SIZE[0], : SIZE[1]]
    expected = np.where(chosen == 1, whole(FULL, pixels, 8), whole(CHEAP, pixels, 2))
    valid = (pixels != 0).any(0)
    assert np.isnan(found[:, ~valid]).all()
    assert np.allclose(found[:, valid], expected[:, valid], atol=1e-4)
    assert run_scene((scene,), target, options(tmp_path, 0.25)).status == "already done"
    with pytest.raises(ValueError, match="another command"):
        run_scene((scene,), target, options(tmp_path, 0.5))


def test_a_killed_run_goes_on_and_a_changed_budget_recomputes_what_it_must(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write(tmp_path / "scene.tif", pixels)
    run_scene((scene,), tmp_path / "whole.zarr", options(tmp_path, 0.5))

    def killed(*_: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(routed_module, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_scene((scene,), tmp_path / "out.zarr", options(tmp_path, 0.25))
    outcome = run_scene((scene,), tmp_path / "out.zarr", options(tmp_path, 0.5))
    regions = (load_record(tmp_path / "out.route.tif").expert == 1).sum()
    assert 0 < outcome.computed <= 32 * 32 * (regions - regions // 2)
    one, other = (open_raster(tmp_path / name).read() for name in ("whole.zarr", "out.zarr"))
    assert np.allclose(one, other, atol=1e-5, equal_nan=True)


def test_a_finished_result_is_rerouted_by_what_changed_only(tmp_path: Path, pixels: np.ndarray) -> None:
    scene, target = write(tmp_path / "scene.tif", pixels), tmp_path / "out.zarr"
    run_scene((scene,), tmp_path / "whole.zarr", options(tmp_path, 0.5))
    first = run_scene((scene,), target, options(tmp_path, 0.25))
    before = load_record(tmp_path / "out.route.tif")
    outcome = run_scene((scene,), target, replace(options(tmp_path, 0.5), overwrite=True))
    after = load_record(tmp_path / "out.route.tif")
    stale = before.stale(after)
    assert 0 < outcome.computed <= 32 * 32 * stale.sum() < first.computed
    one, other = (open_raster(tmp_path / name).read() for name in ("whole.zarr", "out.zarr"))
    assert np.allclose(one, other, atol=1e-5, equal_nan=True)
    # Of a result that was not routed, or by other networks, nothing is taken.
    unrouted = replace(options(tmp_path, 0.5), route=None, overwrite=True)
    run_scene((scene,), target, unrouted)
    again = run_scene((scene,), target, replace(options(tmp_path, 0.25), overwrite=True))
    assert again.computed == first.computed
    other = replace(options(tmp_path, 0.25), model=FULL.replace("width=8", "width=6"), overwrite=True)
    assert run_scene((scene,), target, other).computed == first.computed


def test_a_run_killed_while_it_overwrites_a_region_knows_that_it_is_unsure(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write(tmp_path / "scene.tif", pixels)
    run_scene((scene,), tmp_path / "cheap.zarr", options(tmp_path, 0.0))
    mark = RouteState.mark

    def killed(self: RouteState, cells: list[Box], what: int) -> None:
        if what != UNSURE:  # the pixels are stored, but not yet noted
            raise KeyboardInterrupt
        mark(self, cells, what)

    with monkeypatch.context() as patch:
        patch.setattr(RouteState, "mark", killed)
        with pytest.raises(KeyboardInterrupt):
            run_scene((scene,), tmp_path / "out.zarr", options(tmp_path, 0.5))
    run_scene((scene,), tmp_path / "out.zarr", options(tmp_path, 0.0))
    one, other = (open_raster(tmp_path / name).read() for name in ("cheap.zarr", "out.zarr"))
    assert np.allclose(one, other, atol=1e-5, equal_nan=True)


def test_progress_goes_through_both_networks(tmp_path: Path, pixels: np.ndarray) -> None:
    class Told(Watcher):
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.done = 0.0

        def stage(self, text: str, pixels: int) -> None:
            self.stages.append((text, pixels))

        def computed(self, pixels: float) -> None:
            self.done += pixels

    told = Told()
    scene = write(tmp_path / "scene.tif", pixels)
    outcome = run_scene((scene,), tmp_path / "out.zarr", options(tmp_path, 0.25), watcher=told)
    assert [text.split(":")[0] for text, _ in told.stages] == ["cheap network", "full network"]
    assert told.done == outcome.computed


def test_bad_routes_are_refused_before_work(tmp_path: Path, pixels: np.ndarray) -> None:
    scene, target = write(tmp_path / "scene.tif", pixels), tmp_path / "out.zarr"
    good = options(tmp_path, 0.25)
    with pytest.raises(ValueError, match="leave out --workers"):
        run_scene((scene,), target, replace(good, workers=2))
    with pytest.raises(ValueError, match="leave out --engine tiles"):
        run_scene((scene,), target, replace(good, engine="tiles"))
    with pytest.raises(ValueError, match=r"ROUTE\.toml.*1\.25"):
        run_scene((scene,), target, options(tmp_path, 1.25))
    good = options(tmp_path, 0.25)
    good.route.write_text(f'region = 20\n[cheap]\nmodel = "{CHEAP}"\n')
    with pytest.raises(ValueError, match=r"20 px.*8 px"):
        run_scene((scene,), target, good)
    assert not target.exists()


def plain(previous: Path | None = None) -> Options:
    return Options(model=FULL, scale=255.0, dtype="float32", tile=32, previous=previous, format="zarr")


def test_an_unchanged_revisit_is_copied(tmp_path: Path, pixels: np.ndarray) -> None:
    first = write(tmp_path / "first.tif", pixels)
    (tmp_path / "a").mkdir()
    run_scene((first,), tmp_path / "a" / "first.zarr", plain())
    same = run_scene(
        (write(tmp_path / "same.tif", pixels),), tmp_path / "same.zarr", plain(tmp_path / "a" / "first.zarr")
    )
    assert same.computed == 0 and "100%" in same.routed
    one, other = (open_raster(tmp_path / name).read() for name in ("a/first.zarr", "same.zarr"))
    assert one.tobytes() == other.tobytes()


def test_previous_runs_of_another_grid_or_model_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    first = write(tmp_path / "first.tif", pixels)
    earlier = tmp_path / "first.zarr"
    run_scene((first,), earlier, plain())
    shifted = write(tmp_path / "shifted.tif", pixels, left=2.0)
    with pytest.raises(ValueError, match=r"shifted.*-0\.4 columns and 0 rows"):
        run_scene((shifted,), tmp_path / "b.zarr", plain(earlier))
    with pytest.raises(ValueError, match="MODEL_SHA256"):
        other = replace(plain(earlier), model=FULL.replace("width=8", "width=4"))
        run_scene((first,), tmp_path / "b.zarr", other)
    with pytest.raises(ValueError, match="OPTIONS"):
        run_scene((first,), tmp_path / "b.zarr", replace(plain(earlier), scale=2.0))
    with pytest.raises(ValueError, match=r"nothing\.zarr"):
        run_scene((first,), tmp_path / "b.zarr", plain(tmp_path / "nothing.zarr"))
    write(tmp_path / "first.tif", pixels[::-1])
    with pytest.raises(ValueError, match="changed since"):
        run_scene((shifted.replace("shifted", "first"),), tmp_path / "b.zarr", plain(earlier))
    assert not (tmp_path / "b.zarr").exists()
