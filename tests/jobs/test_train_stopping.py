"""Told to stop, or out of disk: what is done is kept, one line says so, and the same command goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import FAST, WHOLE, assert_same_run, quiet, write_pairs

from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.jobs.train_raster.curves import read_curve
from bigvision.jobs.train_raster.scene_steps import ImageRows, SceneSteps
from bigvision.jobs.train_raster.steps import CropSteps
from bigvision.jobs.train_raster.validation import Validation


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("scenes"))


class Ended(BaseException):
    """What SIGTERM does in a process that has a handler for it."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    assert signal.getsignal(signal.SIGTERM) is end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)


def on_call(kind: type, call: int, mishap: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen in the `call`-th call (from 0) of one kind of object, before its work."""
    original, calls = kind.__call__, 0

    def counting(self: Any, *arguments: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            mishap()
        return original(self, *arguments)

    monkeypatch.setattr(kind, "__call__", counting)


CROPS = replace(FAST, epochs=2, steps_per_epoch=3)
ENDS = {signal.SIGINT: (KeyboardInterrupt, "Ctrl-C"), signal.SIGTERM: (Ended, "SIGTERM")}


@pytest.fixture(scope="module")
def whole_runs(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nobody stopped, on crops and on whole scenes."""
    folder = tmp_path_factory.mktemp("runs")
    for crop, options in ((32, CROPS), (0, WHOLE)):
        train(pairs, folder / str(crop), options, quiet)
    return {crop: folder / str(crop) for crop in (32, 0)}


@pytest.mark.parametrize(
    ("number", "options", "kind", "call", "kept"),
    [
        (signal.SIGINT, CROPS, CropSteps, 0, 1),  # a step of crops is finished first
        (signal.SIGTERM, CROPS, CropSteps, 3, 4),
        (signal.SIGINT, CROPS, Validation, 0, 3),  # an epoch's end is done again
        (signal.SIGINT, CROPS, CropSteps, 5, 6),
        (signal.SIGINT, replace(WHOLE, checkpoint_every=9), SceneSteps, 1, 1),  # is not waited for
        (signal.SIGTERM, WHOLE, Validation, 1, 4),
    ],
)
def test_what_is_done_is_kept_and_the_same_call_goes_on(
    pairs: Path,
    tmp_path: Path,
    whole_runs: dict[int, Path],
    number: signal.Signals,
    options: TrainOptions,
    kind: type,
    call: int,
    kept: int,
) -> None:
    said: list[str] = []
    error, name = ENDS[number]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        on_call(kind, call, lambda: signal.raise_signal(number), patch)
        train(pairs, tmp_path / "parts", options, said.append)
    told = f"step {kept} of .* is kept in .*parts, and the same command goes on from there"
    assert re.fullmatch(f"stopped by {name}: {told}", said[-1])
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == kept
    assert not list((tmp_path / "parts").glob(".*"))
    train(pairs, tmp_path / "parts", options, quiet)
    assert_same_run(whole_runs[options.crop], tmp_path / "parts")


def test_a_whole_scene_is_left_at_once(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its first step nothing is there to keep."""
    original, said = ImageRows.__getitem__, list[str]()
    reads = 0

    def read(self: ImageRows, key: tuple[slice, slice]) -> Any:
        nonlocal reads
        reads += 1
        if reads == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, key)

    monkeypatch.setattr(ImageRows, "__getitem__", read)
    with pytest.raises(Ended):
        train(pairs, tmp_path / "run", WHOLE, said.append)
    assert said[-1] == "stopped by SIGTERM: no step was finished, and the same command begins again"


def test_a_signal_during_the_last_step_leaves_a_complete_run(pairs: Path, tmp_path: Path) -> None:
    labelled = [line for line in pairs.read_text().splitlines() if not line.endswith("val")]
    alone = pairs.with_name("alone.csv")
    alone.write_text("\n".join(labelled))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(CropSteps, 5, lambda: signal.raise_signal(signal.SIGINT), patch)
        train(alone, tmp_path / "run", CROPS, said.append)
    assert "step 6 of 6 is kept" in said[-1]
    train(alone, tmp_path / "run", CROPS, said.append)
    assert (tmp_path / "run" / "weights.safetensors").is_file()
    train(alone, tmp_path / "run", CROPS, said.append)
    assert "finished already" in said[-1]


def test_a_signal_that_is_ignored_stays_so(pairs: Path, tmp_path: Path) -> None:
    """nohup and background jobs of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            on_call(CropSteps, 1, lambda: signal.raise_signal(signal.SIGINT), patch)
            assert train(pairs, tmp_path / "run", CROPS, quiet).steps == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_is_one_trainings_at_a_time(pairs: Path, tmp_path: Path) -> None:
    tried: list[str] = []

    def second() -> None:
        with pytest.raises(ValueError, match="another process is training there") as refused:
            train(pairs, tmp_path / "run", CROPS, quiet)
        tried.append(str(refused.value))

    with pytest.MonkeyPatch.context() as patch:
        on_call(CropSteps, 1, second, patch)
        train(pairs, tmp_path / "run", CROPS, quiet)
    assert len(tried) == 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_overwriting_a_run_leaves_what_is_not_of_it(pairs: Path, tmp_path: Path) -> None:
    options = replace(CROPS, epochs=1)
    train(pairs, tmp_path / "run", options, quiet)
    (tmp_path / "run" / "notes.txt").write_text("what we saw")
    train(pairs, tmp_path / "run", replace(options, lr=0.5, overwrite=True), quiet)
    assert (tmp_path / "run" / "notes.txt").read_text() == "what we saw"


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.jobs.train_raster.run_folder import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
original, calls = getattr(RunFolder, sys.argv[4]), 0
def full(self, *state):
    global calls
    calls += 1
    if calls == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), resource.RLIM_INFINITY))
    return original(self, *state)
setattr(RunFolder, sys.argv[4], full)
try:
    train(Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("method", "file", "limit", "step"),
    [
        ("save_checkpoint", "checkpoint.pt", 5_000, 2),
        ("save_weights", "weights.safetensors", 3_000, 2),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    pairs: Path, tmp_path: Path, method: str, file: str, limit: int, step: int
) -> None:
    options = replace(CROPS, steps_per_epoch=2, epochs=3)
    script = [sys.executable, "-c", FULL, str(pairs), str(tmp_path / "parts"), repr(options)]
    run = subprocess.run([*script, method, str(limit)], capture_output=True, text=True, check=False)
    place = tmp_path / "parts"
    told = f"{place / file} can't be written: File too large; the last checkpoint stands in {place}, of step "
    assert run.stdout.splitlines()[-1] == f"{told}{step}", run.stderr
    assert run.stderr == ""
    assert torch.load(place / "checkpoint.pt", weights_only=True)["step"] == step
    assert not list(place.glob(".*"))


def test_a_damaged_or_strange_checkpoint_is_one_sentence(pairs: Path, tmp_path: Path) -> None:
    options = replace(CROPS, epochs=1)
    train(pairs, tmp_path / "run", options, quiet)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for damage in (whole[:1000], b"", b"strange"):
        checkpoint.write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"^.*checkpoint.pt is no checkpoint to go on from: .*; without it"
        ):
            train(pairs, tmp_path / "run", replace(options, epochs=1), quiet)
    torch.save({"model": 1}, checkpoint)
    with pytest.raises(ValueError, match="it is not of this run"):
        train(pairs, tmp_path / "run", options, quiet)


def command(pairs: Path, out: Path) -> list[str]:
    model = "bigvision.models.small_unet:small_unet?width=4&depth=2"
    start = [
        "from bigvision.cli import main; main()",
        "train",
        "--scenes",
        str(pairs),
        "--model",
        model,
        "--out",
        str(out),
    ]
    steps = ["--epochs", "4", "--steps-per-epoch", "40", "--crop", "32", "--batch", "2"]
    return [sys.executable, "-c", *start, *steps]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_what_is_kept_and_has_the_signals_status(
    pairs: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(pairs, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_curve(out / "training.csv")) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said, errors = process.communicate()
    assert process.returncode == status
    assert f"is kept in {out}, and the same command goes on from there" in said.splitlines()[-1]
    assert "Traceback" not in errors and len(errors.splitlines()) <= 1
