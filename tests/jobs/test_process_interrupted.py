"""Ctrl-C and SIGTERM: one line that says what is kept, the status that a shell expects, nothing lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_scenes import random_pixels, read, write_scene

from bigvision.jobs.process import Options, process_scenes, run_scene
from bigvision.jobs.process.computing import Interrupted
from bigvision.jobs.process.run import Watcher

NETWORKS = Path(__file__).with_name("process_networks.py")
BIGVISION = Path(sys.executable).with_name("bigvision")
MODEL = f"{NETWORKS}:random_net?seed=6"


def command(scene: Path, out: Path, *more: str) -> list[str]:
    return [str(BIGVISION), "process", str(scene), "--model", MODEL, "--out", str(out), *more]


def interrupted(arguments: list[str], ledger: Path, sign: signal.Signals) -> tuple[int, list[str]]:
    """Status and lines of a command whose whole process group gets a signal once something is kept."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        while not any(ledger.glob("done/*")) and not any(ledger.glob("strips/*")):
            assert process.poll() is None, "finished before it could be interrupted"
            time.sleep(0.02)
        if sign is signal.SIGINT:  # a terminal sends it to every process of the command
            os.killpg(process.pid, sign)
        else:
            process.send_signal(sign)
        text, _ = process.communicate()
    return process.returncode, text.splitlines()


@pytest.mark.parametrize(
    ("sign", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "cut",
    [
        ("--tile", "16", "--engine", "tiles"),
        pytest.param(("--workers", "1", "--tile", "16", "--engine", "tiles"), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_command_says_what_it_keeps(
    tmp_path: Path, sign: signal.Signals, status: int, cut: tuple[str, ...]
) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 240, 240)))
    arguments = command(scene, tmp_path / "out", "--dtype", "float32", *cut)
    code, lines = interrupted(arguments, tmp_path / "out" / ".scene.tif.run", sign)
    assert code == status
    assert lines[-1].startswith("stopped: 0 of 1 scene(s) finished, ")
    assert lines[-1].endswith(f"% of {scene} kept; the same command goes on from there")
    told = [line for line in lines[:-1] if not line.startswith((str(scene), "scene.tif: "))]
    assert told == []  # no traceback, of no process


class Interrupt(Watcher):
    """Ctrl-C after so many pixels, or while the result is written."""

    def __init__(self, after: float = float("inf")) -> None:
        self.after = after

    def computed(self, pixels: float) -> None:
        self.after -= pixels
        if self.after <= 0:
            raise KeyboardInterrupt

    def finishing(self, fraction: float) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["tiles", "stream"])
def test_an_interruption_tells_the_part_that_is_kept(tmp_path: Path, engine: str) -> None:
    scene, target = write_scene(tmp_path / "scene.tif", random_pixels((3, 256, 128))), tmp_path / "out.tif"
    options = Options(MODEL, engine=engine, tile=64, dtype="float32")
    for after, kept in ((64 * 128, 0.25), (128 * 128, 0.75), (float("inf"), 1.0)):
        with pytest.raises(Interrupted) as stop:
            run_scene((str(scene),), target, options, watcher=Interrupt(after))
        assert stop.value.kept >= kept
    run_scene((str(scene),), target, options)
    run_scene((str(scene),), tmp_path / "whole.tif", options)
    np.testing.assert_array_equal(read(target), read(tmp_path / "whole.tif"))


def test_scenes_that_are_finished_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [str(write_scene(tmp_path / f"{name}.tif", random_pixels((3, 20, 20)))) for name in "abc"]

    def second_is_interrupted(paths: tuple[str, ...], *rest: object, **more: object) -> object:
        if "b.tif" in paths[0]:
            raise Interrupted(0.426)
        return run_scene(paths, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("bigvision.jobs.process.job.run_scene", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        process_scenes(scenes, tmp_path / "out", Options(MODEL, dtype="float32"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped: 1 of 3 scene(s) finished, 43% of {scenes[1]} kept; the same command goes on from there"
    )
