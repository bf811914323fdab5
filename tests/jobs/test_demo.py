"""The demonstration, small: every file it promises, and pixels on the scene's own grid."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigvision.jobs.demo import demo
from datasets.scenes import CLASSES
from tiling import open_raster


def test_the_demo_leaves_a_cog_and_a_picture_and_can_be_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        result = demo(tmp_path / "demo", 192, steps=3, say=said.append)
    scene, prediction = open_raster(tmp_path / "demo" / "scene.tif"), open_raster(result.cog)
    assert prediction.shape == (1, 192, 192)
    assert prediction.transform == scene.transform and prediction.crs == scene.crs
    assert np.unique(prediction.read()).max() < len(CLASSES)
    truth = open_raster(tmp_path / "demo" / "labels.tif").read()[0, :, 64:]
    assert result.accuracy == pytest.approx(np.mean(prediction.read()[0, :, 64:] == truth))
    assert result.megapixels_per_second > 0 and result.peak_bytes > 50e6
    with Image.open(result.picture) as picture:
        assert picture.size[0] > 1000
    assert str(tmp_path / "demo" / "scene.tif") in said[0]


def test_a_scene_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 96 pixels, got 50"):
        demo(tmp_path / "demo", 50)
    assert not (tmp_path / "demo").exists()
