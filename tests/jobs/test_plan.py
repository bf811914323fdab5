"""The plan's figures against counts by hand, and the command that prints them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

from bigvision.cli import app
from bigvision.cli.plan import text
from bigvision.jobs.plan import plan
from bigvision.jobs.process.options import Options
from bigvision.models.spec import load_model
from bigvision.streaming.forecast import PROCESS_BYTES

MODEL = "bigvision.models.small_unet:small_unet?width=8&depth=2"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tall scene of which no pixel is stored."""
    path = tmp_path_factory.mktemp("plan") / "tall.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=20_000,
        width=300,
        count=4,
        dtype="uint8",
        nodata=0,
        tiled=True,
        sparse_ok=True,
        photometric="minisblack",
    ):
        pass
    return str(path)


@pytest.fixture(scope="module")
def options() -> Options:
    return Options(MODEL, memory="1500MiB", dtype="float32")


def test_counts_by_hand(scene: str, options: Options) -> None:
    found = plan(scene, options)
    model = load_model(MODEL)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.shape == (4, 20_000, 300) and found.classes == 5
    assert (found.stride, found.inexact) == (4, ())
    assert found.output_bytes == 20_000 * 300
    # Convolutions by hand: output pixels x 2 x kernel x channels in x out; pixelwise operators add a little.
    quarter, sixteenth = 10_000 * 150, 5_000 * 75
    convolutions = 18 * (
        quarter * (4 * 8 + 8 * 8) + sixteenth * (8 * 16 + 16 * 16) + quarter * (24 * 8 + 8 * 20)
    )
    assert convolutions < found.flops < 1.1 * convolutions
    assert found.flops_per_parameter == found.flops / found.parameters
    assert found.bytes_per_flop == (found.weight_bytes + found.activation_bytes) / found.flops
    assert found.seconds > 0


def test_streaming_takes_less_than_the_whole_and_no_more_for_a_taller_scene(
    scene: str, options: Options, tmp_path: Path
) -> None:
    found = plan(scene, options)
    assert found.streaming is not None
    assert found.streaming.forward_bytes < found.dense_forward_bytes / 20
    own = PROCESS_BYTES  # which the figure of the whole image leaves out
    assert found.streaming.training_bytes - own < found.dense_training_bytes / 4
    assert found.streaming.training_bytes <= options.memory_bytes
    with rasterio.open(scene) as file:
        profile = file.profile | {"height": 10_000, "sparse_ok": True, "photometric": "minisblack"}
    with rasterio.open(tmp_path / "half.tif", "w", **profile):
        pass
    half = plan(str(tmp_path / "half.tif"), options)
    assert half.streaming is not None
    assert half.streaming.forward_bytes == found.streaming.forward_bytes
    assert half.dense_training_bytes < 0.6 * found.dense_training_bytes


def test_a_budget_too_small_is_said_with_what_would_do(scene: str, options: Options) -> None:
    found = plan(scene, replace(options, memory="400kB"))
    told = r"--memory 400kB can't be met: .*; at least --memory 1\d{3}MiB is needed"
    assert found.cut is None and re.fullmatch(told, found.refused)
    assert found.streaming is not None and re.fullmatch(told, found.streaming.training_refused)
    assert f"refused: {found.streaming.training_refused}" in text(found)
    assert found.seconds == 0


def test_the_command_prints_and_writes_the_plan(scene: str, tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    arguments = ["plan", scene, "--model", MODEL, "--dtype", "float32", "--json", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in (
        "20000 x 300",
        "parameters",
        "run whole",
        "trained streamed",
        "predicted peak",
        "computing time",
    ):
        assert word in result.output
    assert json.loads(report.read_text())["shape"] == [4, 20_000, 300]


def test_bands_that_need_no_halo_are_told_with_their_passes(scene: str, options: Options) -> None:
    network = f"{Path(__file__).parent}/process_networks.py:gated_net?bands=4"
    (line,) = (
        line
        for line in text(plan(scene, replace(options, model=network))).splitlines()
        if line.startswith("process")
    )
    assert "rows, 3 passes for the scene's statistics, stride 2 px (exact)" in line
    assert "halo" not in line
    (line,) = (line for line in text(plan(scene, options)).splitlines() if line.startswith("process"))
    assert "rows with a halo of" in line


def test_a_scene_of_other_bands_is_refused(tmp_path: Path, options: Options) -> None:
    with rasterio.open(
        tmp_path / "one.tif", "w", driver="GTiff", height=40, width=40, count=1, dtype="uint8"
    ) as file:
        file.write(np.ones((1, 40, 40), np.uint8))
    with pytest.raises(ValueError, match="takes 4 bands, the scene has 1"):
        plan(str(tmp_path / "one.tif"), options)
