"""`bigvision train --route`: it learns, its files are what `process --route` takes, it resumes exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.windows import Window
from train_runs import FAST, MODEL, interrupted_at, quiet, write_pairs
from typer.testing import CliRunner

from bigvision.cli import app
from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.train_raster import routed as routed_module
from bigvision.jobs.train_raster import train
from bigvision.jobs.train_raster.curves import read_curve
from bigvision.jobs.train_raster.steps import CropSteps
from bigvision.routing.record import load_record
from bigvision.routing.route_file import load_route
from tiling import open_raster

CHEAP = "bigvision.models.small_unet:small_unet?width=2&depth=1"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def route(tmp_path: Path) -> Path:
    path = tmp_path / "ROUTE.toml"
    path.write_text(f'region = 16\ngate = "learned"\nbudget = 0.25\n[cheap]\nmodel = "{CHEAP}"\n')
    return path


def test_a_trained_route_is_what_process_takes(pairs: Path, route: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    result = train(pairs, run, replace(FAST, epochs=3, steps_per_epoch=8, route=route), said.append)
    losses = [row["loss"] for row in read_curve(run / "training.csv")]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) and "mean IoU" in said[-1]
    assert result.command.endswith(f"--route {run / 'ROUTE.toml'} --out DIR")
    spec = load_route(run / "ROUTE.toml")
    assert spec.weights == run / "cheap.safetensors" and spec.gate_weights == run / "gate.safetensors"
    assert (spec.region, spec.budget, spec.gate, spec.model) == (16, 0.25, "learned", CHEAP)
    scene = str(pairs.parent / "c.tif")
    about = Options(
        MODEL, weights=result.weights, scale=255, mean=(0.4,), std=(0.2,), dtype="float32",
        route=run / "ROUTE.toml", format="zarr",
    )  # fmt: skip
    run_scene((scene,), tmp_path / "c.zarr", about)
    record = load_record(tmp_path / "c.route.tif")
    assert (record.expert == 1).sum() == (record.expert >= 0).sum() // 4
    assert len(np.unique(record.score)) > 10  # the gate has something to say of each region
    # The last epoch's score is that of the very scene that process makes, where that epoch was the best.
    rows = read_curve(run / "validation.csv")
    best = max(rows, key=lambda row: row["mean_iou"])
    found = open_raster(tmp_path / "c.zarr").read()[0]
    truth = open_raster(pairs.parent / "c_classes.tif").read(Window(0, 0, *found.shape[::-1]))[0]
    assert best["accuracy"] == pytest.approx((found == truth).mean(), abs=2e-4)


def test_a_routed_run_stopped_anywhere_ends_like_one_that_was_not(
    pairs: Path, route: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = iter([1e-3, 5e-3, *(7e-3,) * 100])  # another machine load on every start
    monkeypatch.setattr(routed_module, "seconds", lambda function, repeats: next(latency))
    options = replace(FAST, epochs=2, steps_per_epoch=3, checkpoint_every=1, route=route)
    for stop in (2, 4):
        interrupted_at(CropSteps, stop, lambda: train(pairs, tmp_path / "parts", options, quiet))
    train(pairs, tmp_path / "parts", options, quiet)
    latency = iter([1e-3, 5e-3])
    train(pairs, tmp_path / "whole", options, quiet)
    for name in (
        "training.csv", "validation.csv", "weights.safetensors", "cheap.safetensors", "gate.safetensors",
        "ROUTE.toml",
    ):  # fmt: skip
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["model"]
    assert state["cost"].tolist() == pytest.approx([1e-3, 6e-3])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("16", "24", ["--crop 32", "24 px"]),
        ("learned", "entropy", ["'entropy'", "nothing to train"]),
        ("0.25", "1.5", ["budget", "0..1", "1.5"]),
        ("width=2", "classes=4", ["4 classes", "5"]),
        ("width=2", "in_channels=3", ["4 channels"]),
        ("depth=1", "depth=5", ["16"]),
    ],
)
def test_routes_that_cannot_be_trained_are_refused(
    pairs: Path, route: Path, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    route.write_text(route.read_text().replace(old, new))
    with pytest.raises(ValueError) as refusal:
        train(pairs, tmp_path / "run", replace(FAST, route=route), quiet)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not (tmp_path / "run").exists()


def test_whole_scenes_have_no_regions(pairs: Path, route: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--crop 0"):
        train(pairs, tmp_path / "run", replace(FAST, route=route, crop=0), quiet)


@pytest.mark.slow
def test_another_route_is_another_run(pairs: Path, route: Path, tmp_path: Path) -> None:
    options = replace(FAST, epochs=1, steps_per_epoch=1, route=route)
    train(pairs, tmp_path / "run", options, quiet)
    route.write_text(route.read_text().replace("0.25", "0.5"))
    with pytest.raises(ValueError, match="another run"):
        train(pairs, tmp_path / "run", options, quiet)


def test_the_command_trains_a_route(pairs: Path, route: Path, tmp_path: Path) -> None:
    words = ["train", "--scenes", str(pairs), "--model", MODEL, "--route", str(route)]
    words += ["--out", str(tmp_path / "run"), "--epochs", "1", "--steps-per-epoch", "1", "--crop", "32"]
    found = CliRunner().invoke(app, [*words, "--batch", "1"])
    assert found.exit_code == 0, found.output
    assert f"--route {tmp_path / 'run' / 'ROUTE.toml'}" in found.output
