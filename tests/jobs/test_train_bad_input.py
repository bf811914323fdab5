"""What can go wrong while a run works ends in one sentence, and the last checkpoint stays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from train_runs import FAST, WHOLE, quiet, write_pairs

from bigvision.jobs.process.scene import Scene
from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.jobs.train_raster.scene_steps import SceneSteps
from datasets.scene_files import write_scene
from datasets.scenes import Scene as SyntheticScene


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "scenes").mkdir()
    return write_pairs(tmp_path / "scenes")


def after_a_step(monkeypatch: pytest.MonkeyPatch, mishap: Callable[[], Any]) -> None:
    """Let something happen between the first step and the second."""
    original = SceneSteps.__call__

    def call(self: SceneSteps, model: torch.nn.Module, step: int) -> Any:
        if step == 1:
            mishap()
        return original(self, model, step)

    monkeypatch.setattr(SceneSteps, "__call__", call)


def rewrite(path: Path, height: int, *, labels: bool = False) -> None:
    """Another scene of 131 columns in a file's place."""
    path.unlink()
    write_scene(SyntheticScene(height, 131, seed=5), path, labels=labels)


def assert_stops(message: str, pairs: Path, out: Path, options: TrainOptions = WHOLE) -> None:
    with pytest.raises(RuntimeError, match=f"step 2: .*{message}.*; the last checkpoint stands in"):
        train(pairs, out, options, quiet)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 1


def test_a_scene_that_changes_its_size(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow() -> None:
        for name in "ab":
            rewrite(pairs.with_name(f"{name}.tif"), 190)
            rewrite(pairs.with_name(f"{name}_classes.tif"), 190, labels=True)

    after_a_step(monkeypatch, grow)
    assert_stops(
        r"[ab].tif: is \(4, 190, 131\) now, was \(4, 1[56]0, 131\) when training began",
        pairs,
        tmp_path / "run",
    )


def test_rows_that_raise_on_read(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scene.read

    def broken() -> None:
        def read(self: Scene, window: Any) -> Any:
            if window.row_off == 64:
                raise OSError("bad sector")
            return original(self, window)

        monkeypatch.setattr(Scene, "read", read)

    after_a_step(monkeypatch, broken)
    assert_stops("reading rows 64..96 of the source failed: bad sector", pairs, tmp_path / "run")


def test_a_file_cut_short_while_training(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut() -> None:
        for name in "ab":
            path = pairs.with_name(f"{name}.tif")
            path.write_bytes(path.read_bytes()[:3000])

    after_a_step(monkeypatch, cut)
    assert_stops(r"[ab].tif", pairs, tmp_path / "run")


def test_a_scene_loss_that_is_no_number(pairs: Path, tmp_path: Path) -> None:
    assert_stops(r"not finite", pairs, tmp_path / "run", replace(WHOLE, optimizer="sgd", lr=1e30))


def test_a_gradient_that_is_not_finite_names_its_rows(pairs: Path, tmp_path: Path) -> None:
    """The loss is finite, and its derivative by a weight is not."""
    network = tmp_path / "root.py"
    network.write_text(
        "import torch\nfrom torch import nn\n"
        "class Root(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(4, 5, 1)\n"
        "        nn.init.zeros_(self.conv.weight); nn.init.zeros_(self.conv.bias)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).abs().sqrt()\n"
        "def root():\n    return Root()\n"
    )
    options = replace(WHOLE, model=f"{network}:root")
    with pytest.raises(
        RuntimeError, match=r"step 1: the gradient of .* not finite at step \d+ of \d+, image rows"
    ):
        train(pairs, tmp_path / "run", options, quiet)


def test_labels_of_another_size_or_crs_are_refused_before_any_work(pairs: Path, tmp_path: Path) -> None:
    labels = pairs.with_name("b_classes.tif")
    with rasterio.open(labels, "r+") as file:
        file.crs = "EPSG:3857"
    with pytest.raises(ValueError, match=r"b_classes.tif: CRS EPSG:3857, but .*b.tif has EPSG"):
        train(pairs, tmp_path / "run", FAST, quiet)
    rewrite(labels, 150, labels=True)
    with pytest.raises(ValueError, match=r"b_classes.tif: 150 x 131 labels for 160 x 131 pixels of .*b.tif"):
        train(pairs, tmp_path / "run", FAST, quiet)
    assert not (tmp_path / "run").exists()


def test_unknown_classes_of_a_held_out_scene_are_refused_before_any_work(pairs: Path, tmp_path: Path) -> None:
    with rasterio.open(pairs.with_name("c_classes.tif"), "r+") as file:
        classes = file.read(1)
        classes[7, 9] = 77
        file.write(classes, 1)
    with pytest.raises(ValueError, match=r"c_classes.tif: class 77 at row 7, column 9; .* classes 0 to 4"):
        train(pairs, tmp_path / "run", FAST, quiet)
    assert not (tmp_path / "run").exists()


def test_tensorboard_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.jobs.train_raster.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard, which"):
        replace(FAST, tensorboard=True)


def test_memory_that_validation_cannot_meet_is_refused_too(pairs: Path, tmp_path: Path) -> None:
    """Crops take what they take; the held-out scene is streamed."""
    with pytest.raises(ValueError, match=r"--memory 1GB can't be met: streaming 131 columns takes .* \d+MiB"):
        train(pairs, tmp_path / "run", replace(FAST, memory="1GB"), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_least_memory_that_is_named_is_enough(pairs: Path, tmp_path: Path) -> None:
    options = replace(WHOLE, epochs=1, memory="1GB", rows=None)
    with pytest.raises(ValueError) as told:
        train(pairs, tmp_path / "run", options, quiet)
    least = str(told.value).rpartition("at least --memory ")[2].split()[0]
    train(pairs, tmp_path / "run", replace(options, memory=least), quiet)
    assert np.isfinite(float((tmp_path / "run" / "training.csv").read_text().split(",")[-1]))
