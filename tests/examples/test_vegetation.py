"""Vegetation from colour: its labels by hand, its pipeline on two small dates, its claim on the real ones."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin
from rasterio.windows import Window

from bigvision.jobs.process import Options
from bigvision.jobs.process.scene import open_scene

EXAMPLE = Path(__file__).parents[2] / "examples" / "vegetation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vegetation_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_scene(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=bands,
        height=height,
        width=width,
        dtype="uint8",
        nodata=0,
        crs="EPSG:26914",
        transform=from_origin(0, 0, 5, 5),
        photometric="minisblack",
    ) as file:
        file.write(pixels)


@given(st.lists(st.integers(-20, 20), min_size=3, max_size=60).filter(lambda values: len(set(values)) >= 3))
def test_the_upper_threshold_parts_three_classes_best(example: ModuleType, numbers: list[int]) -> None:
    values = np.array(numbers, np.float32)
    counts, edges = np.histogram(values, example.BINS)
    centres = (edges[1:] + edges[:-1]) / 2

    def scatter(inside: slice) -> float:
        number = counts[inside].sum()
        mean = (counts[inside] * centres[inside]).sum() / max(number, 1)
        return float((counts[inside] * (centres[inside] - mean) ** 2).sum())

    used = np.flatnonzero(counts) + 1  # splits elsewhere are one of these again
    splits = [(i, j) for i in used for j in used if i < j < example.BINS]
    least = {j: np.inf for _, j in splits}
    for i, j in splits:
        scattered = scatter(slice(0, i)) + scatter(slice(i, j)) + scatter(slice(j, None))
        least[j] = min(least[j], scattered)
    found = example.upper_threshold(values)
    at = int(np.abs(edges - found).argmin())
    assert edges[at] == found
    same = max(j for j in used if j <= at)  # no value between: the same split
    assert least[same] <= min(least.values()) * (1 + 1e-6) + 1e-6


def test_labels_are_the_upper_of_three_kinds_whatever_the_stretch(example: ModuleType) -> None:
    # Columns: green plants twice, soil twice, water twice, nothing.
    red = np.array([50, 52, 100, 104, 40, 42, 0], np.uint8)
    infrared = np.array([150, 154, 104, 106, 10, 12, 0], np.uint8)
    scene = np.stack([red, red, red, infrared])[:, None]
    expected = [1, 1, 0, 0, 0, 0, 255]
    assert example.vegetation_labels(scene)[0].tolist() == expected
    scene[3] = infrared // 2  # a flight whose infrared was stretched half as far
    assert example.vegetation_labels(scene)[0].tolist() == expected


def test_a_scene_without_data_has_no_labels(example: ModuleType) -> None:
    assert (example.vegetation_labels(np.zeros((4, 2, 3), np.uint8)) == 255).all()


def test_training_sees_what_processing_sees(example: ModuleType, tmp_path: Path) -> None:
    """Scenes written in their own units, and --mean and --std on the photograph itself, are one thing."""
    pixels = np.random.default_rng(1).integers(1, 200, (4, 20, 31)).astype(np.uint8)
    pixels[:, 3:5, :7] = 0
    scene = tmp_path / "a_20190101.tif"
    write_scene(scene, pixels)
    line = example.write_pair(scene, tmp_path / "out")
    standard, labels = line.strip().split(",")
    mean, std = example.statistics(scene)
    window = Window(0, 0, 31, 20)
    trained, seen = open_scene([str(tmp_path / "out" / standard)], Options("m")).read(window)
    used, known = open_scene([str(scene)], Options("m", bands=(1, 2, 3), mean=mean, std=std)).read(window)
    np.testing.assert_allclose(trained, used, atol=1e-5)
    assert (seen == known).all() and not seen[3:5, :7].any()
    np.testing.assert_allclose(trained[:, seen].mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(trained[:, seen].std(1), 1, atol=1e-5)
    with rasterio.open(tmp_path / "out" / labels) as file:
        assert ((file.read(1) == 255) == ~seen).all() and file.nodata == 255


def test_the_pipeline_runs_on_two_small_dates(example: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for date in ("20200101", "20190101"):
        plants = generator.random((64, 80)) < 0.5
        pixels = generator.integers(60, 90, (4, 64, 80)).astype(np.uint8)
        pixels[3][plants] = 200
        write_scene(tmp_path / "dates" / f"a_{date}.tif", pixels)
    scenes = list((tmp_path / "dates").iterdir())
    result = example.vegetation(scenes, tmp_path / "out", example.Training(steps=2, crop=32))
    assert 0 <= result.iou <= 1 and result.prediction.name == "a_20200101.tif"
    assert 0 < result.all_vegetation < 1 and result.majority >= 0.5
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_dates_are_needed(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 scenes"):
        example.vegetation([tmp_path / "a_20200101.tif"], tmp_path)
    with pytest.raises(ValueError, match=r"b\.tif: no date"):
        example.vegetation([tmp_path / "a_20200101.tif", tmp_path / "b.tif"], tmp_path)


@pytest.mark.slow
def test_the_newest_photograph_is_predicted(example: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    scenes = sorted((shared_data / "rasters" / "naip").glob("*.tif"))
    result = example.vegetation(scenes, tmp_path)
    assert result.iou >= 0.65  # measured: 0.6725, by settings chosen without sight of this date
    assert result.iou > result.all_vegetation + 0.1 and result.accuracy > result.majority
