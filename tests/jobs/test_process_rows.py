"""Rows are kept as they leave the network: a job stopped inside a band goes on there, to the same bytes."""

import time
from pathlib import Path

import numpy as np
import pytest
from process_scenes import random_pixels, write_scene

from bigvision.jobs.process import Options, process_scenes, run_scene
from bigvision.jobs.process.following import followed
from bigvision.jobs.process.row_log import RowLog
from bigvision.jobs.process.run import Outcome, Watcher
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
SHAPE = (3, 620, 131)


class Stop(BaseException):
    """What no job expects: a kill, as near as one process comes to it."""


class StopAfter(Watcher):
    """Sums what is told, and stops the run after so many calls."""

    def __init__(self, calls: int = 10**9) -> None:
        self.calls, self.left, self.done = calls, 0, 0.0

    def planned(self, scene: str, plan: object, pixels: int, left: int) -> None:
        self.left = left

    def computed(self, pixels: float) -> None:
        self.done += pixels
        self.calls -= 1
        if self.calls == 0:
            raise Stop


@pytest.fixture(autouse=True)
def _small_strips_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.jobs.process.planning._STRIP_BYTES", 1)  # strips of 64 rows
    monkeypatch.setattr("bigvision.streaming.plan.PIXELS_A_STEP", 16 * 131)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = random_pixels(SHAPE, 1)
    pixels[:, 150:240, 20:60] = 0
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, nodata=0)


def options(model: str, **more: object) -> Options:
    chosen = {"dtype": "float32", "engine": "stream", "output": "logits", "format": "zarr"} | more
    return Options(model=f"{NETWORKS}:{model}", **chosen)  # type: ignore[arg-type]


def run(scene: Path, target: Path, chosen: Options, watch: Watcher | None = None) -> Outcome:
    return run_scene((str(scene),), target, chosen, watcher=watch)


@pytest.mark.parametrize(
    ("model", "strips", "format"),
    [
        ("random_net?seed=6", (2, 3), "cog"),
        ("random_net?seed=3", (7,), "zarr"),
        ("gated_net", (3, 2), "zarr"),
        pytest.param("excited_net", (4, 1), "cog", marks=pytest.mark.slow),
    ],
)
def test_a_job_stopped_inside_its_only_band_goes_on_there(
    scene: Path, tmp_path: Path, model: str, strips: tuple[int, ...], format: str
) -> None:
    chosen, suffix = options(model, format=format), ".zarr" if format == "zarr" else ".tif"
    whole = StopAfter()
    run(scene, tmp_path / f"whole{suffix}", chosen, whole)
    target, left = tmp_path / f"scene{suffix}", float(SHAPE[1] * SHAPE[2])
    sums = 10**9 - whole.calls - 10  # told while statistics are summed; strips are ten
    for number in strips:
        watch, sums = StopAfter(sums + number), 0
        with pytest.raises(Stop):
            run(scene, target, chosen, watch)
        assert watch.left == pytest.approx(left, abs=2)
        left -= watch.done
    kept = RowLog(tmp_path / f".{target.name}.run" / "strips").rows(0)
    assert 0 < kept < SHAPE[1] and kept % 64 == 0
    last = StopAfter()
    outcome = run(scene, target, chosen, last)
    assert last.left == pytest.approx(left, abs=2) and last.left < SHAPE[1] * SHAPE[2] - 64 * SHAPE[2] / 3
    assert last.done == pytest.approx(last.left, abs=2) and outcome.computed == last.left
    one, other = (open_raster(path) for path in (target, tmp_path / f"whole{suffix}"))
    assert one.read().tobytes() == other.read().tobytes()
    assert not list(tmp_path.glob(".*"))


def test_the_bar_moves_with_the_rows(scene: Path, tmp_path: Path) -> None:
    told: list[float] = []
    watch = StopAfter()
    watch.computed = told.append  # type: ignore[method-assign]
    run(scene, tmp_path / "scene.zarr", options("random_net?seed=6"), watch)
    assert len(told) == 10  # strips of 64 rows
    assert sum(told) == SHAPE[1] * SHAPE[2]


def test_the_bar_moves_while_statistics_are_summed(scene: Path, tmp_path: Path) -> None:
    told: list[float] = []
    watch = StopAfter()
    watch.computed = told.append  # type: ignore[method-assign]
    run(scene, tmp_path / "scene.zarr", options("gated_net"), watch)
    assert len(told) > 3 * 30
    assert sum(told) == pytest.approx(SHAPE[1] * SHAPE[2], abs=2)


@pytest.mark.slow
def test_workers_go_on_inside_a_band(scene: Path, tmp_path: Path) -> None:
    for model, stop in (("random_net?seed=6", 3), ("excited_net", 130)):
        one, two = tmp_path / model / "one", tmp_path / model / "two"
        chosen = options(model, workers=2)
        assert process_scenes([str(scene)], one, chosen)
        with pytest.raises(Stop):
            two.mkdir()
            run(scene, two / "scene.zarr", chosen, StopAfter(stop))
        kept = RowLog(two / ".scene.zarr.run" / "strips").all()
        assert any(kept.values())
        assert process_scenes([str(scene)], two, chosen)
        whole, resumed = (open_raster(folder / "scene.zarr").read() for folder in (one, two))
        assert whole.tobytes() == resumed.tobytes()


class TestRowLog:
    def test_says_how_far_each_unit_is(self, tmp_path: Path) -> None:
        log = RowLog(tmp_path / "strips")
        assert log.all() == {} and log.rows(3) == 0
        for unit, rows in ((3, 64), (3, 128), (0, 64), (3, 64)):
            log.add(unit, rows)
        assert log.all() == {0: 64, 3: 128}

    @pytest.mark.parametrize("torn", [b"1", b"192", b"\xff\xfe", b"-5\n", b"many\n", b"\0\0\0\n"])
    def test_takes_no_word_of_a_torn_line(self, tmp_path: Path, torn: bytes) -> None:
        log = RowLog(tmp_path)
        log.add(7, 64)
        with (tmp_path / "7").open("ab") as file:
            file.write(torn)
        assert log.rows(7) == 64


def test_work_elsewhere_is_looked_up() -> None:
    told: list[int] = []
    stored = 10
    with followed(told.append, remote=True, stored=lambda: stored, interval=0.01) as tell:
        assert tell is None
        stored = 25
        while not told:
            time.sleep(0.01)
        stored = 40
    assert sum(told) == 30 and 0 not in told


def test_what_is_left_is_computed_in_the_steps_of_the_whole(scene: Path) -> None:
    """A shorter band begins whole steps lower, more than its halo above what it keeps."""
    from rasterio.windows import Window

    from bigvision.jobs.process.stream import StreamEngine
    from tiling import Tile

    engine = StreamEngine(rows=24, stride=16, halo=80)
    unit = Tile(1, Window(0, 800, 50, 800), Window(0, 720, 50, 960))
    for rows in range(0, 800, 64):
        left = engine.below(unit, rows)
        assert left.core == Window(0, 800 + rows, 50, 800 - rows)
        skipped = left.padded.row_off - unit.padded.row_off
        assert skipped % 48 == 0 and left.padded.row_off + left.padded.height == 1680
        above = left.core.row_off - left.padded.row_off
        assert above >= 80 and (skipped == 0 or 80 + 24 <= above < 80 + 24 + 48)
    assert np.array_equal(engine.below(unit, 0).padded.toslices(), unit.padded.toslices())
