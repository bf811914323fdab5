"""Vegetation from colour: its labels by hand, its pipeline on small dates, its claim on the real ones."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from photographs import dates, photograph, write_scene
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="scikit-learn comes with the development extras")
import vegetation as example
import vegetation_truth as truth
from vegetation_network import trees

from bigvision.jobs.process.run import run_scene

SMALL = example.Settings(trees=9, leaves=4, windows=3, pixels=4000)


@given(st.lists(st.integers(-20, 20), min_size=3, max_size=60).filter(lambda values: len(set(values)) >= 3))
def test_the_upper_threshold_parts_three_classes_best(numbers: list[int]) -> None:
    values = np.array(numbers, np.float32)
    counts, edges = np.histogram(values, truth.BINS)
    centres = (edges[1:] + edges[:-1]) / 2

    def scatter(inside: slice) -> float:
        number = counts[inside].sum()
        mean = (counts[inside] * centres[inside]).sum() / max(number, 1)
        return float((counts[inside] * (centres[inside] - mean) ** 2).sum())

    used = np.flatnonzero(counts) + 1  # splits elsewhere are one of these again
    splits = [(i, j) for i in used for j in used if i < j < truth.BINS]
    least = {j: np.inf for _, j in splits}
    for i, j in splits:
        scattered = scatter(slice(0, i)) + scatter(slice(i, j)) + scatter(slice(j, None))
        least[j] = min(least[j], scattered)
    found = truth.upper_threshold(values)
    at = int(np.abs(edges - found).argmin())
    assert edges[at] == found
    same = max(j for j in used if j <= at)  # no value between: the same split
    assert least[same] <= min(least.values()) * (1 + 1e-6) + 1e-6


def test_labels_are_the_upper_of_three_kinds_whatever_the_stretch() -> None:
    # Columns: green plants twice, soil twice, water twice, nothing.
    red = np.array([50, 52, 100, 104, 40, 42, 0], np.uint8)
    infrared = np.array([150, 154, 104, 106, 10, 12, 0], np.uint8)
    scene = np.stack([red, red, red, infrared])[:, None]
    expected = [1, 1, 0, 0, 0, 0, 255]
    assert truth.vegetation_labels(scene)[0].tolist() == expected
    scene[3] = infrared // 2  # a flight whose infrared was stretched half as far
    assert truth.vegetation_labels(scene)[0].tolist() == expected


def test_a_scene_without_data_has_no_labels() -> None:
    assert (truth.vegetation_labels(np.zeros((4, 2, 3), np.uint8)) == 255).all()


def test_training_sees_what_processing_sees(tmp_path: Path) -> None:
    """The features that trees are fitted to, and those of the network as the job runs it."""
    pixels = photograph(1)
    pixels[:, 40:50, 20:30] = 0
    scene = write_scene(tmp_path / "a_20190101.tif", pixels)
    example.train([scene], SMALL, tmp_path / "trees.safetensors")
    network = trees(SMALL.trees, SMALL.leaves, SMALL.windows)
    network.load_state_dict(load_file(tmp_path / "trees.safetensors"))
    with torch.inference_mode():
        whole = network(torch.from_numpy(example.colours(scene))[None])[0, 0].numpy() > 0
    options = example.processing(SMALL.model(), tmp_path / "trees.safetensors")
    outcome = run_scene((str(scene),), tmp_path / "found.tif", options)
    assert outcome.plan is not None and outcome.plan.engine == "stream" and outcome.plan.exactness == "exact"
    with rasterio.open(tmp_path / "found.tif") as file:
        found = file.read(1)
    seen = pixels.any(0)
    assert ((found == truth.NONE) == ~seen).all()
    # A feature rounded otherwise (window sums are added up in another order) may fall across a split.
    assert (found[seen] != whole[seen]).mean() < 1e-3
    assert (found == truth.vegetation_labels(pixels))[seen].mean() > 0.95


def test_the_trivial_rule_takes_the_best_threshold_of_the_known_dates() -> None:
    best = truth.best_threshold([photograph(0), photograph(1, 0.6)])
    assert truth.greenness_iou(photograph(2), best) > 0.95
    assert truth.greenness_iou(photograph(2), -1.0) == pytest.approx(0.5)  # everything vegetation
    assert truth.greenness_iou(photograph(2), 3.0) == 0


def test_the_pipeline_predicts_the_newest_of_small_dates(tmp_path: Path) -> None:
    result, trivial = example.vegetation(dates(tmp_path / "dates"), tmp_path / "out", SMALL)
    assert result.prediction.name == "a_20200101.tif" and 0 <= trivial <= 1
    assert result.iou > 0.95 and result.accuracy > 0.95
    assert result.all_vegetation == pytest.approx(0.5) and result.majority == pytest.approx(0.5)
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_dates_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 scenes"):
        example.vegetation([tmp_path / "a_20200101.tif"], tmp_path)
    with pytest.raises(ValueError, match=r"b\.tif: no date"):
        example.vegetation([tmp_path / "a_20200101.tif", tmp_path / "b.tif"], tmp_path)


@pytest.mark.slow
def test_the_newest_photograph_is_predicted(shared_data: Path, tmp_path: Path) -> None:
    scenes = sorted((shared_data / "rasters" / "naip").glob("*.tif"))
    result, trivial = example.vegetation(scenes, tmp_path)
    assert result.iou >= 0.75
    assert result.iou > max(result.all_vegetation, trivial) + 0.1 and result.accuracy > result.majority
