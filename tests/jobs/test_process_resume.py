"""Killed at any moment, the same command goes on and gives the same bytes; another command reuses nothing."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from process_scenes import random_pixels, read, write_scene

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.run import Watcher
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
BIGVISION = Path(sys.executable).with_name("bigvision")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene") / "scene.tif", random_pixels((3, 300, 260), 1))


def options(**more: object) -> Options:
    chosen = {"model": f"{NETWORKS}:random_net?seed=6", "tile": 32, "dtype": "float32"} | more
    return Options(**chosen)  # type: ignore[arg-type]


def command(scene: Path, out: Path, *more: str) -> list[str]:
    model = f"{NETWORKS}:random_net?seed=6"
    return [str(BIGVISION), "process", str(scene), "--model", model, "--out", str(out), "--tile", "16", *more]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def kill_after(units: int, arguments: list[str], ledger: Path) -> None:
    """Start a command and kill it as soon as so many units are done."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (ledger / "done").is_dir() or len(names(ledger / "done")) < units:
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("format", "kills"), [("cog", (40,)), pytest.param("zarr", (20, 90, 200), marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_byte_identical(
    scene: Path, tmp_path: Path, format: str, kills: tuple[int, ...]
) -> None:
    name = "scene.tif" if format == "cog" else "scene.zarr"
    arguments = command(scene, tmp_path / "killed", "--format", format, "--output", "probabilities")
    for units in kills:
        kill_after(units, arguments, tmp_path / "killed" / f".{name}.run")
        assert not (tmp_path / "killed" / name).exists()
    resumed = subprocess.run(arguments, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "was finished before" in resumed.stderr
    subprocess.run(
        command(scene, tmp_path / "whole", "--format", format, "--output", "probabilities"),
        capture_output=True,
        check=True,
    )
    one, other = (open_raster(tmp_path / folder / name) for folder in ("killed", "whole"))
    assert one.read().tobytes() == other.read().tobytes()
    assert names(tmp_path / "killed") == [name]


class Stop(BaseException):
    pass


class StopAfter(Watcher):
    """Stops a run as a failing disk would, after some units or while finishing."""

    def __init__(self, units: int | None) -> None:
        self.units = units

    def computed(self, pixels: float) -> None:
        if self.units is not None:
            self.units -= 1
            if self.units <= 0:
                raise Stop

    def finishing(self, fraction: float) -> None:
        if self.units is None:
            raise Stop


class Counting(Watcher):
    left = pixels = 0

    def planned(self, scene: str, plan: object, pixels: int, left: int) -> None:
        self.left, self.pixels = left, pixels


def stopped(scene: Path, target: Path, chosen: Options, units: int | None = 30) -> None:
    with pytest.raises(Stop):
        run_scene((str(scene),), target, chosen, watcher=StopAfter(units))


def test_stopped_while_finishing_computes_nothing_again(scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "scene.tif"
    stopped(scene, target, options(), None)
    assert run_scene((str(scene),), target, options()).computed == 0
    assert names(tmp_path) == ["scene.tif"]


def test_a_finished_result_is_left_alone(scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "scene.tif"
    assert run_scene((str(scene),), target, options()).status == "done"
    before = target.stat().st_mtime_ns
    assert run_scene((str(scene),), target, options()).status == "already done"
    assert target.stat().st_mtime_ns == before


def changed_weights(folder: Path) -> Callable[[], Options]:
    def make() -> Options:
        from bigvision.models.spec import load_model

        state = load_model(options().model).state_dict()
        torch.save({name: value + 0.01 for name, value in state.items()}, folder / "weights.pth")
        return options(weights=folder / "weights.pth")

    return make


CHANGES = {
    "option": lambda: options(scale=2.0),
    "output": lambda: options(output="logits"),
    "model": lambda: options(model=f"{NETWORKS}:random_net?seed=5"),
}


@pytest.mark.parametrize("change", [*CHANGES, "weights", "input"])
def test_what_changed_reuses_nothing(scene: Path, tmp_path: Path, change: str) -> None:
    mine = write_scene(tmp_path / "scene.tif", open_raster(scene).read())
    target = tmp_path / "out.tif"
    stopped(mine, target, options())
    if change == "input":
        pixels = open_raster(scene).read()
        pixels[:, 0, 0] = 7
        write_scene(mine, pixels)
    make = CHANGES.get(change, changed_weights(tmp_path) if change == "weights" else options)
    watch = Counting()
    run_scene((str(mine),), target, make(), watcher=watch)
    assert watch.left == watch.pixels == 300 * 260


def test_the_result_of_another_command_is_not_overwritten(scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "scene.tif"
    run_scene((str(scene),), target, options())
    before = target.read_bytes()
    with pytest.raises(ValueError, match=r"scene\.tif: exists and was made by another command"):
        run_scene((str(scene),), target, options(scale=2.0))
    assert target.read_bytes() == before
    run_scene((str(scene),), target, options(scale=2.0, overwrite=True))
    assert target.read_bytes() != before


def test_a_file_that_is_no_result_is_not_overwritten(scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "scene.tif"
    target.write_text("notes")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and was not made by bigvision process, so it stays"):
            run_scene((str(scene),), target, options(overwrite=overwrite))
    assert target.read_text() == "notes"


def test_two_at_once_on_one_result_are_told(scene: Path, tmp_path: Path) -> None:
    from bigvision.jobs.process.ledger import open_ledger

    target = tmp_path / "scene.tif"
    with open_ledger(target), pytest.raises(ValueError, match="another process is making this result"):
        run_scene((str(scene),), target, options())


def test_the_choice_of_the_type_is_kept(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes the type that the first one chose, even where it would choose another now."""
    from bigvision.jobs.process import precision

    target = tmp_path / "scene.tif"
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    chosen = options(dtype="auto", min_agreement=0.0)
    stopped(scene, target, chosen)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: False)
    outcome = run_scene((str(scene),), target, chosen)
    assert outcome.plan is not None
    assert outcome.plan.dtype == "bfloat16"
    assert outcome.plan.agreement is not None
    assert np.isin(read(target), range(4)).all()
