"""What an interrupted run left: kept however the rest is cut, believed where it is sound."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_scenes import random_pixels, read, write_scene
from test_process_resume import NETWORKS, Counting, Stop, StopAfter, names

from bigvision.jobs.process import Options, planning, run_scene
from bigvision.jobs.process.run import Outcome
from tiling import open_raster

SIZE = (64, 48)
PIXELS = SIZE[0] * SIZE[1]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", random_pixels((3, *SIZE), 1))


def options(**more: Any) -> Options:
    return Options(
        **{"model": f"{NETWORKS}:random_net?seed=6", "tile": 16, "dtype": "float32", "output": "logits"}
        | more
    )


@pytest.fixture(scope="module")
def whole(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    target = tmp_path_factory.mktemp("whole") / "out.tif"
    run_scene((str(scene),), target, options())
    return read(target)


def begun(scene: Path, target: Path, units: int = 7, **more: Any) -> Path:
    """An interrupted run of at least so many units; its folder."""
    with pytest.raises(Stop):
        run_scene((str(scene),), target, options(**more), watcher=StopAfter(units))
    return target.with_name(f".{target.name}.run")


def resumed(scene: Path, target: Path, **more: Any) -> tuple[Outcome, int]:
    watch = Counting()
    return run_scene((str(scene),), target, options(**more), watcher=watch), watch.left


@pytest.mark.parametrize(
    "cut",
    [
        {"memory": "3GiB"},
        {"scratch_limit": "1GiB"},
        {"min_agreement": 0.5},
        {"tile": 32},
        {"tile": None, "engine": "stream"},
    ],
    ids=str,
)
def test_another_cut_keeps_what_is_finished(
    scene: Path, tmp_path: Path, whole: np.ndarray, cut: dict[str, Any]
) -> None:
    target = tmp_path / "out.tif"
    begun(scene, target)
    outcome, left = resumed(scene, target, **cut)
    assert 0 < left <= PIXELS - 7 * 256
    assert outcome.plan is not None and outcome.plan.tile == 16
    assert np.array_equal(read(target), whole)


def test_less_memory_computes_tiles_in_smaller_ones(scene: Path, tmp_path: Path) -> None:
    big = write_scene(tmp_path / "big.tif", random_pixels((3, 1024, 1024), 2))
    wishes = {"model": f"{NETWORKS}:random_net?seed=2", "tile": 512}
    exact, target = tmp_path / "exact.tif", tmp_path / "out.tif"
    run_scene((str(big),), exact, options(**wishes))
    begun(big, target, 1, **wishes)
    plan = json.loads((tmp_path / ".out.tif.run" / "run.json").read_text())["plan"]
    less = plan["predicted_bytes"] - 30 * 2**20
    outcome, left = resumed(big, target, **wishes, memory=str(less))
    assert outcome.plan is not None and 0 < outcome.plan.inner < 512 and outcome.plan.predicted_bytes <= less
    assert left <= 1024 * 1024 - 512 * 512
    np.testing.assert_allclose(read(target), read(exact), rtol=0, atol=1e-4 * np.abs(read(exact)).max())


def test_too_little_memory_deletes_nothing(scene: Path, tmp_path: Path, whole: np.ndarray) -> None:
    target = tmp_path / "out.tif"
    folder = begun(scene, target)
    with pytest.raises(ValueError, match=r"go on with as much, or remove that folder"):
        run_scene((str(scene),), target, options(memory="1MiB"))
    outcome, left = resumed(scene, target)
    assert left <= PIXELS - 7 * 256 and not outcome.warning and not folder.exists()


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "pixels.zarr" / "0" / "c").rglob("*") if path.is_file())


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


HARM: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeros": zeroed,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_finished_shard_that_lost_its_bytes_is_made_again(
    scene: Path, tmp_path: Path, whole: np.ndarray, harm: str
) -> None:
    target = tmp_path / "out.tif"
    folder = begun(scene, target)
    done = len(names(folder / "done"))
    HARM[harm](shards(folder)[0])
    outcome, left = resumed(scene, target)
    assert "1 part(s) of the unfinished run were damaged" in outcome.warning
    assert left == PIXELS - (done - 1) * 256
    assert np.array_equal(read(target), whole)


def test_a_streamed_band_loses_only_what_is_below_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_STRIP_BYTES", 1)  # strips of 64 rows
    target = tmp_path / "out.tif"
    tall = write_scene(tmp_path / "tall.tif", random_pixels((3, 512, 48), 3))
    wishes = {"tile": None, "engine": "stream"}
    folder = begun(tall, target, 3, **wishes)
    zeroed(shards(folder)[1])
    outcome, left = resumed(tall, target, **wishes)
    assert "damaged" in outcome.warning and left == (512 - 64) * 48
    run_scene((str(tall),), tmp_path / "whole.tif", options(**wishes))
    np.testing.assert_allclose(read(target), read(tmp_path / "whole.tif"), rtol=0, atol=1e-3)


def run_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "run.json").read_text())
        changed = change(record)
        (folder / "run.json").write_text(json.dumps(record if changed is None else changed))

    return edit


def as_file(name: str) -> Callable[[Path], Any]:
    def replace(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).write_text("?")

    return replace


# What is wrong with a folder, and whether what was finished is given up for it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "no json": (lambda folder: (folder / "run.json").write_text("{"), True),
    "empty json": (lambda folder: (folder / "run.json").write_text(""), True),
    "bytes": (lambda folder: (folder / "run.json").write_bytes(b"\xff\0\xfe"), True),
    "a list": (run_json(lambda _: [1]), True),
    "nothing in it": (run_json(lambda _: {}), True),
    "no plan": (run_json(lambda record: record.pop("plan") and None), True),
    "another plan": (run_json(lambda record: record["plan"].update(colour=1)), True),
    "a plan of words": (run_json(lambda record: record["plan"].update(tile="sixteen")), True),
    "a folder": (lambda folder: (folder / "run.json").unlink() or (folder / "run.json").mkdir(), True),
    "gone": (lambda folder: (folder / "run.json").unlink(), True),
    "no store": (lambda folder: shutil.rmtree(folder / "pixels.zarr"), True),
    "a file as store": (as_file("pixels.zarr"), True),
    "a broken store": (lambda folder: (folder / "pixels.zarr" / "0" / "zarr.json").write_text("{"), True),
    "a file of marks": (as_file("done"), True),
    "a stray mark": (lambda folder: (folder / "done" / "notes.txt").write_text("?"), False),
    "a mark beyond": (lambda folder: (folder / "done" / "99999").write_text("?"), False),
    "a stray file": (lambda folder: (folder / "notes.txt").write_text("?"), False),
    "empty marks": (lambda folder: [mark.write_text("") for mark in (folder / "done").iterdir()], True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_told_and_blocks_nothing(
    scene: Path, tmp_path: Path, whole: np.ndarray, damage: str
) -> None:
    target = tmp_path / "out.tif"
    folder = begun(scene, target)
    harm, given_up = DAMAGE[damage]
    harm(folder)
    outcome, left = resumed(scene, target)
    assert (left == PIXELS) == given_up
    assert ("damaged" in outcome.warning) == (damage not in ("gone", "a stray mark", "a stray file"))
    assert np.array_equal(read(target), whole)
    assert names(tmp_path) == ["out.tif"]


@pytest.mark.parametrize("kind", ["file", "lock"])
def test_what_is_no_run_is_named(scene: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ".out.tif.run"
    folder.write_text("mine") if kind == "file" else (folder / "lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"\.out\.tif\.run.*: is (no|a) folder, and .* move it away"):
        run_scene((str(scene),), tmp_path / "out.tif", options())


class TestNothingIsLeft:
    def test_by_a_kill_after_the_result_has_its_name(
        self, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from bigvision.jobs.process import ledger

        target = tmp_path / "out.tif"
        with monkeypatch.context() as patch:
            patch.setattr(ledger.Ledger, "remove", lambda self: None)
            run_scene((str(scene),), target, options())
        assert names(tmp_path) == [".out.tif.run", "out.tif"]
        with ledger.open_ledger(target):
            assert run_scene((str(scene),), target, options()).status == "already done"
            assert names(tmp_path) == [".out.tif.run", "out.tif"], "another process makes it anew"
        assert run_scene((str(scene),), target, options()).status == "already done"
        assert names(tmp_path) == ["out.tif"]

    def test_by_a_scene_that_is_refused(self, scene: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="can't be met"):
            run_scene((str(scene),), tmp_path / "out.tif", options(memory="1MiB"))
        assert names(tmp_path) == []


def test_a_share_that_was_copied_is_told_of_a_resumed_run_too(scene: Path, tmp_path: Path) -> None:
    """All was computed before the kill or after it; nothing was copied."""
    run_scene((str(scene),), tmp_path / "first.tif", options())
    other = write_scene(tmp_path / "other.tif", random_pixels((3, *SIZE), 9))
    target = tmp_path / "out.tif"
    begun(other, target, 5, previous=tmp_path / "first.tif")
    assert resumed(other, target, previous=tmp_path / "first.tif")[0].routed.startswith("0% as in")
    pixels = open_raster(scene).read()
    pixels[:, :2, :2] += 1
    near = write_scene(tmp_path / "near.tif", pixels)
    target = tmp_path / "near_out.tif"
    begun(near, target, 1, previous=tmp_path / "first.tif")
    outcome, _ = resumed(near, target, previous=tmp_path / "first.tif")
    assert not outcome.routed.startswith(("0%", "100%"))


@pytest.mark.parametrize(
    "kept",
    [
        "rows/*.rows",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sums/**/*.safetensors", "sums/rows.json")),
    ],
)
@pytest.mark.slow
def test_damaged_statistics_are_taken_again(scene: Path, tmp_path: Path, kept: str) -> None:
    """Of a network that takes statistics of the scene, and keeps values between its passes."""
    wishes = {"model": f"{NETWORKS}:excited_net?bands=3", "tile": 16, "engine": "stream"}
    target, exact = tmp_path / "out.tif", tmp_path / "exact.tif"
    run_scene((str(scene),), exact, options(**wishes))
    folder = begun(scene, target, 11, **wishes)
    (folder / "sums" / "phase-0" / "1x.safetensors").write_text("a stray file")
    harmed = sorted(folder.glob(kept))[-1]
    harmed.write_bytes(harmed.read_bytes()[:-1])
    outcome, _ = resumed(scene, target, **wishes)
    assert "damaged" in outcome.warning
    np.testing.assert_allclose(read(target), read(exact), rtol=0, atol=1e-4)
