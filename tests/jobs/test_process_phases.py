"""Networks with statistics over the scene: bands are summed, kept, resumed and shared like any other unit."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from process_scenes import random_pixels, read, whole_image, write_scene

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.phases import PhaseStore
from bigvision.jobs.process.run import Watcher
from bigvision.models.spec import load_model
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
GATED = f"{NETWORKS}:gated_net?bands=3"  # every pass starts from the scene
EXCITED = f"{NETWORKS}:excited_net?bands=3"  # the last one starts from what the second kept
STRIDES = {GATED: 2, EXCITED: 4}
BIGVISION = Path(sys.executable).with_name("bigvision")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = random_pixels((3, 300, 131), 1)
    pixels[:, 100:180, 20:60] = 0
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, nodata=0)


def options(**more: object) -> Options:
    chosen = {"model": EXCITED, "tile": 64, "dtype": "float32", "engine": "stream"}
    chosen |= {"output": "logits", "format": "zarr"} | more
    return Options(**chosen)  # type: ignore[arg-type]


def expected(scene: Path, model: str) -> np.ndarray:
    pixels = read(scene).astype(np.float32)
    whole = whole_image(load_model(model), pixels, STRIDES[model])
    return np.where(pixels.any(0), whole, np.nan)


@pytest.mark.parametrize("model", [GATED, EXCITED])
def test_any_split_is_the_whole_image_and_one_split_the_same_bytes(
    scene: Path, tmp_path: Path, model: str
) -> None:
    whole, results = expected(scene, model), []
    for name, tile in (("a", 64), ("again", 64), ("b", 192), ("c", 8192)):
        outcome = run_scene((str(scene),), tmp_path / f"{name}.zarr", options(model=model, tile=tile))
        assert outcome.plan is not None
        assert (outcome.plan.engine, outcome.plan.phases, outcome.plan.exactness) == ("stream", 2, "exact")
        assert (outcome.plan.scratch > 0) == (model == EXCITED)
        results.append(open_raster(tmp_path / f"{name}.zarr").read())
        np.testing.assert_allclose(results[-1], whole, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(whole)))
    assert results[0].tobytes() == results[1].tobytes()


class Watched(Watcher):
    """The most bytes that passes kept for later ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0

    def computed(self, pixels: float) -> None:
        self.most = max(self.most, sum(path.stat().st_size for path in self.folder.glob("*.rows")))


@pytest.mark.parametrize("limit", ["1MB", "79200", "79199", "0"])
def test_passes_keep_what_was_planned_within_the_limit(scene: Path, tmp_path: Path, limit: str) -> None:
    """Two values of 4 channels at a quarter of the resolution: 2 x 4 x 75 x 33 x 4 bytes."""
    watched = Watched(tmp_path / ".scene.zarr.run" / "rows")
    chosen = options(scratch_limit=limit)
    outcome = run_scene((str(scene),), tmp_path / "scene.zarr", chosen, watcher=watched)
    assert outcome.plan is not None
    assert watched.most == outcome.plan.scratch == (79200 if limit in ("1MB", "79200") else 0)
    found = open_raster(tmp_path / "scene.zarr").read()
    whole = expected(scene, EXCITED)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(whole)))
    assert not list(tmp_path.glob(".scene*"))


def test_passes_leave_half_of_the_free_disk(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 79199))
    outcome = run_scene((str(scene),), tmp_path / "scene.zarr", options())
    assert outcome.plan is not None
    assert outcome.plan.scratch == 0


class Stop(BaseException):
    pass


class StopAfter(Watcher):
    """Stops a run once some of the three times 300 rows are summed or stored."""

    def __init__(self, rows: int = 10**9) -> None:
        self.rows, self.seen, self.left = rows, 0.0, 0

    def planned(self, scene: str, plan: object, pixels: int, left: int) -> None:
        self.left = left

    def computed(self, pixels: float) -> None:
        self.seen += 3 * pixels / 131
        if self.seen > self.rows:
            raise Stop


@pytest.mark.parametrize(("rows", "summed"), [(130, (2, 0)), (300 + 70, (5, 1)), (600 + 100, (5, 5))])
def test_a_run_stopped_in_any_phase_sums_nothing_twice(
    scene: Path, tmp_path: Path, rows: int, summed: tuple[int, int]
) -> None:
    """Five bands of 64 rows, two phases and the output."""
    target = tmp_path / "scene.zarr"
    with pytest.raises(Stop):
        run_scene((str(scene),), target, options(), watcher=StopAfter(rows))
    store = PhaseStore(tmp_path / ".scene.zarr.run" / "sums", 5)
    assert tuple(len(store.done(phase)) for phase in (0, 1)) == summed
    rest = StopAfter()
    run_scene((str(scene),), target, options(), watcher=rest)
    assert 900 - rows - 64 <= rest.seen <= 900 - 64 * sum(summed) + 2 * 20  # the lowest band has 44 rows
    assert rest.left < 300 * 131
    run_scene((str(scene),), tmp_path / "whole.zarr", options())
    one, two = (open_raster(tmp_path / name).read() for name in ("scene.zarr", "whole.zarr"))
    assert one.tobytes() == two.tobytes()


def command(scene: Path, out: Path, *more: str) -> list[str]:
    words = [
        str(BIGVISION),
        "process",
        str(scene),
        "--model",
        EXCITED,
        "--out",
        str(out),
        "--dtype",
        "float32",
    ]
    return [*words, "--output", "logits", "--engine", "stream", "--format", "zarr", *more]


@pytest.mark.slow
def test_kill_9_between_phases_changes_no_byte(scene: Path, tmp_path: Path) -> None:
    arguments = command(scene, tmp_path / "killed", "--tile", "16")
    sums = tmp_path / "killed" / ".scene.zarr.run" / "sums"
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(sums.glob("phase-*/*.safetensors"))) < 3:
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    resumed = subprocess.run(arguments, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "was finished before" in resumed.stderr
    run_scene((str(scene),), tmp_path / "whole.zarr", options(tile=16))
    one = open_raster(tmp_path / "killed" / "scene.zarr").read()
    assert one.tobytes() == open_raster(tmp_path / "whole.zarr").read().tobytes()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["scene.zarr"]


@pytest.mark.slow
def test_workers_share_the_phases(scene: Path, tmp_path: Path) -> None:
    arguments = command(scene, tmp_path / "shared", "--tile", "64", "--workers", "2", "--memory", "6GiB")
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passes for the scene's statistics" in done.stderr
    run_scene((str(scene),), tmp_path / "alone.zarr", options())
    one = open_raster(tmp_path / "shared" / "scene.zarr").read()
    assert one.tobytes() == open_raster(tmp_path / "alone.zarr").read().tobytes()


def test_sums_come_back_as_they_were_kept(tmp_path: Path) -> None:
    store = PhaseStore(tmp_path, 2)
    parts = [{"mean 1": (torch.rand(3).double(), torch.rand(1, 2).double()), "b": (torch.rand(2).double(),)}]
    parts.append({"b": (torch.full((2,), torch.inf).double(),)})
    for band in (1, 0):
        store.save(3, band, parts[band])
    assert store.done(3) == {0, 1}
    assert store.done(0) == frozenset()
    found = store.load(3, "cpu")
    for one, other in zip(found, parts, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    with pytest.raises(FileNotFoundError):
        PhaseStore(tmp_path, 3).load(3, "cpu")
