"""Boosted trees over colour and texture: features by hand, tiles like the whole, the claim on real dates."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

pytest.importorskip("sklearn", reason="scikit-learn comes with the development extras")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))  # it imports its neighbour, as a script does
    spec = importlib.util.spec_from_file_location("vegetation_trees", EXAMPLES / "vegetation_trees.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def photograph(seed: int, light: float = 1.0) -> np.ndarray:
    """Green grainy plants on the left, smooth grey ground on the right: [4, 150, 130]."""
    draw = np.random.default_rng(seed)
    scene = np.full((4, 150, 130), 90.0)
    scene[1, :, :65] += draw.uniform(10, 60, (150, 65))
    scene[3, :, :65] += 90
    scene += draw.uniform(-3, 3, scene.shape)
    return (scene * light).clip(1, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    about = {
        "crs": "EPSG:26914",
        "transform": from_origin(0, 0, 5, 5),
        "photometric": "minisblack",
        "nodata": 0,
    }
    with rasterio.open(
        path, "w", driver="GTiff", count=4, height=150, width=130, dtype="uint8", **about
    ) as file:
        file.write(pixels)
    return path


def test_features_are_shares_of_the_light_and_how_much_they_vary(example: ModuleType) -> None:
    flat = np.stack([np.full((70, 80), value, np.uint8) for value in (50, 100, 50, 9)])
    found = example.features(flat, example.brightness(flat))
    assert found.shape == (70, 80, 38) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :3], np.broadcast_to([0.25, 0.5, 1.0], (70, 80, 3)), rtol=1e-6)
    np.testing.assert_allclose(found[..., -1], np.log(1e-4), rtol=1e-3)  # no grain
    brighter = example.features(2 * flat, example.brightness(2 * flat))
    np.testing.assert_allclose(brighter[..., :3], found[..., :3], rtol=1e-6)


def test_tiles_are_predicted_like_the_whole(example: ModuleType, tmp_path: Path) -> None:
    trees = example.train([photograph(0), photograph(1, 0.6)], pixels=4000)
    pixels = photograph(2, 0.8)
    pixels[:, 40:50, 20:30] = 0
    scene = write(tmp_path / "a_20200101.tif", pixels)
    example.predict(trees, scene, tmp_path / "found.tif", tile=64)
    values = example.features(pixels, example.brightness(pixels))
    whole = trees.predict(values.reshape(-1, 38)).reshape(150, 130)
    whole[40:50, 20:30] = 255
    with rasterio.open(tmp_path / "found.tif") as file:
        found = file.read(1)
        assert file.nodata == 255 and file.crs == "EPSG:26914"
    assert (found != whole).mean() < 1e-3  # running sums begin elsewhere: a value may fall across a split
    assert (found == example.vegetation_labels(pixels)).mean() > 0.95


def test_the_trivial_rule_takes_the_best_threshold_of_the_known_dates(example: ModuleType) -> None:
    known = [photograph(0), photograph(1, 0.6)]
    best = example.best_threshold(known)
    assert example.greenness_iou(photograph(2), best) > 0.95
    assert example.greenness_iou(photograph(2), -1.0) == pytest.approx(0.5)  # everything vegetation
    assert example.greenness_iou(photograph(2), 3.0) == 0


@pytest.mark.slow
def test_the_newest_photograph_is_predicted(example: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    scenes = sorted((shared_data / "rasters" / "naip").glob("*.tif"))
    result, trivial = example.vegetation(scenes, tmp_path)
    assert result.iou >= 0.75  # measured: 0.7932
    assert result.iou > max(result.all_vegetation, trivial) + 0.1 and result.accuracy > result.majority
    assert result.picture.read_bytes().startswith(b"\x89PNG")
