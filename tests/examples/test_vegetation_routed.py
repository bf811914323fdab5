"""Vegetation routed: the pipeline on small dates, and its claim on the real ones."""

from pathlib import Path

import numpy as np
import pytest
from photographs import dates, photograph, write_scene

pytest.importorskip("sklearn", reason="scikit-learn comes with the development extras")
import vegetation_routed as example
from vegetation import Settings

from bigvision.routing.record import load_record


def test_the_exposure_is_that_of_pixels_with_data(tmp_path: Path) -> None:
    pixels = photograph(0)
    pixels[:, :75] = 0
    scene = write_scene(tmp_path / "a_20200101.tif", pixels)
    assert example.exposure(scene) == pytest.approx(np.mean(pixels[:3, 75:], axis=(1, 2)).sum())


def test_the_pipeline_runs_on_small_dates(tmp_path: Path) -> None:
    full, cheap = (Settings(trees, 4, windows, pixels=2000) for trees, windows in ((8, 3), (1, 1)))
    scenes = dates(tmp_path / "dates", (64, 96))
    result = example.routed_vegetation(scenes, tmp_path / "out", full, cheap, region=32, budget=0.34)
    assert set(result.iou) == set(result.seconds) == {"cheap", "full", "routed"}
    assert all(0 <= iou <= 1 for iou in result.iou.values()) and 0 < result.share < 1
    record = load_record(tmp_path / "out" / "routed" / "a_20200101.route.tif")
    assert record.counts() == {"cheap": 4, "full": 2, "nodata": 0}
    assert "cheap 4" in result.summary


@pytest.mark.slow
def test_routing_keeps_the_full_network_s_map_at_half_its_compute(shared_data: Path, tmp_path: Path) -> None:
    scenes = sorted((shared_data / "rasters" / "naip").glob("*.tif"))
    result = example.routed_vegetation(scenes, tmp_path)
    assert result.share <= 0.5
    assert result.iou["routed"] >= result.iou["full"] - 0.01
