"""Held-out scenes are scored as whole images, and as `bigvision process` then computes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from train_runs import FAST, quiet, whole_image, write_networks, write_pairs
from typer.testing import CliRunner

from bigvision.cli import app
from bigvision.jobs.train_raster import TrainingResult, train
from bigvision.jobs.train_raster.curves import read_curve
from bigvision.models.spec import load_model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("scenes"))


def assert_scored_whole(model: str, result: TrainingResult) -> None:
    """The run's last score against the held-out scene run whole, in float64."""
    network = load_model(model, result.weights).double().eval()
    image, truth = whole_image(2)
    with torch.no_grad():
        logits = network(image.double())
    answer, seen = logits.argmax(1)[0], truth[0]
    score = read_curve(result.folder / "validation.csv")[-1]
    assert score["accuracy"] == pytest.approx(float((answer == seen).double().mean()), abs=2 / seen.numel())
    assert score["loss"] == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-5)
    for k in range(5):
        right = ((answer == k) & (seen == k)).sum()
        union = ((answer == k) | (seen == k)).sum()
        if union:
            assert score[f"iou_{k}"] == pytest.approx(float(right / union), abs=3 / float(union))


def test_a_network_with_statistics_of_the_scene_is_scored_exactly(pairs: Path, tmp_path: Path) -> None:
    model = f"{write_networks(tmp_path)}:gated"
    assert_scored_whole(model, train(pairs, tmp_path / "run", replace(FAST, model=model, epochs=1), quiet))


def test_process_takes_the_result_and_agrees_with_the_score(pairs: Path, tmp_path: Path) -> None:
    """The command that a run prints, run as printed."""
    result = train(pairs, tmp_path / "run", FAST, quiet)
    words = result.command.replace("'", "").split()[1:]
    words[words.index("SCENE")], words[words.index("DIR")] = (
        str(pairs.parent / "c.tif"),
        str(tmp_path / "out"),
    )
    done = CliRunner().invoke(app, [*words, "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    with rasterio.open(tmp_path / "out" / "c.tif") as file:
        answer = file.read(1)
    right = float(np.mean(answer == whole_image(2)[1][0].numpy()))
    best = max(read_curve(tmp_path / "run" / "validation.csv"), key=lambda row: row["mean_iou"])
    assert right == pytest.approx(best["accuracy"], abs=2 / answer.size)


def test_a_network_without_a_graph_is_scored_by_tiles_and_says_so(pairs: Path, tmp_path: Path) -> None:
    """Here one tile is the whole scene."""
    said: list[str] = []
    options = replace(FAST, model=f"{write_networks(tmp_path)}:branching", epochs=1)
    result = train(pairs, tmp_path / "run", options, said.append)
    assert "approximated by tiles with a halo of 128 px" in said[0]
    assert_scored_whole(options.model, result)
