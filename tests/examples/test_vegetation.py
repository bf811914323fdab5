"""Vegetation from colour: its labels by hand, its pipeline on two small dates, its claim on the real ones."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

EXAMPLE = Path(__file__).parents[2] / "examples" / "vegetation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vegetation_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_labels_are_where_near_infrared_exceeds_red(example: ModuleType) -> None:
    # red, green, blue, near infrared of four pixels: plant, soil, water, nothing.
    pixels = np.array([[50, 100, 40, 0], [60, 90, 50, 0], [40, 80, 60, 0], [150, 90, 10, 0]], np.uint8)
    assert example.vegetation_labels(pixels[:, None])[0].tolist() == [1, 0, 0, 255]


def test_the_pipeline_runs_on_two_small_dates(example: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "dates").mkdir()
    for date in ("20190101", "20200101"):
        plants = generator.random((64, 80)) < 0.5
        pixels = generator.integers(60, 90, (4, 64, 80)).astype(np.uint8)
        pixels[3][plants] = 200
        with rasterio.open(
            tmp_path / "dates" / f"a_{date}.tif",
            "w",
            driver="GTiff",
            count=4,
            height=64,
            width=80,
            dtype="uint8",
            crs="EPSG:26914",
            transform=from_origin(0, 0, 5, 5),
            photometric="minisblack",
        ) as file:
            file.write(pixels)
    result = example.vegetation(tmp_path / "dates", tmp_path / "out", steps=2)
    assert 0 <= result.iou <= 1 and result.prediction.name == "a_20200101.tif"
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="0 scenes"):
        example.vegetation(tmp_path / "out" / "run", tmp_path / "none")


@pytest.mark.slow
def test_the_newest_photograph_is_predicted(example: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    result = example.vegetation(shared_data / "rasters" / "naip", tmp_path)
    assert result.iou >= 0.65
