"""Real scenes: every layout and nodata of them, and a world map in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from process_networks import random_net
from process_scenes import whole_image

from bigvision.jobs.process import Options, process_scenes
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
STRIDE = 4
SCENES = {
    "naip/m_4709963_se_14_1_20200831.tif": 4,
    "rgbn_uint8.tif": 4,
    "fourband_uint16_nodata0.tif": 4,
    "landsat_rgb_nodata0.tif": 3,
    "mosaic_a_uint16.tif": 3,
    "mosaic_b_uint16.tif": 3,
}


@pytest.mark.parametrize("name", SCENES)
def test_tiled_equals_whole_on_its_grid(shared_data: Path, tmp_path: Path, name: str) -> None:
    scene, bands = shared_data / "rasters" / name, SCENES[name]
    source = open_raster(scene)
    top = 255.0 if source.dtype == np.uint8 else 10_000.0
    options = Options(
        model=f"{NETWORKS}:random_net?seed=6&bands={bands}",
        dtype="float32",
        output="logits",
        tile=256,
        scale=top,
        mean=(0.3,),
        std=(0.2,),
    )
    assert process_scenes([str(scene)], tmp_path, options)
    result = open_raster(tmp_path / Path(name).name)
    with rasterio.open(scene) as dataset:
        shown = dataset.dataset_mask() > 0
        pixels = dataset.read()
        missing = dataset.read_masks() == 0
        assert (result.crs, result.transform, result.shape[1:]) == (
            dataset.crs,
            dataset.transform,
            dataset.shape,
        )
    normal = (pixels.astype(np.float32) / np.float32(top) - 0.3) / 0.2
    normal[missing] = 0
    expected = whole_image(random_net(6, bands), normal, STRIDE)
    expected[:, ~shown] = np.nan
    np.testing.assert_allclose(result.read(), expected, rtol=0, atol=1e-4 * np.nanmax(np.abs(expected)))


def test_the_result_says_where_it_comes_from(shared_data: Path, tmp_path: Path) -> None:
    scene = shared_data / "rasters" / "landsat_rgb_nodata0.tif"
    options = Options(model=f"{NETWORKS}:random_net?seed=6", scale=255)
    assert process_scenes([str(scene)], tmp_path, options)
    result = open_raster(tmp_path / scene.name)
    tags = result.tags
    assert result.band_names == ("class",) and result.nodata == 255
    assert result.colormap is not None and len({result.colormap[k] for k in range(4)}) == 4
    assert tags["BIGVISION_EXACTNESS"] == "exact"
    assert tags["BIGVISION_DTYPE"] in ("float32", "bfloat16")
    assert len(tags["BIGVISION_MODEL_SHA256"]) == 64
    assert json.loads(tags["BIGVISION_OPTIONS"])["scale"] == 255
    assert json.loads(tags["BIGVISION_INPUT"]) == [str(scene.absolute())]


def test_results_are_valid_cogs(shared_data: Path, tmp_path: Path) -> None:
    from rio_cogeo import cog_validate

    scene = shared_data / "rasters" / "fourband_uint16_nodata0.tif"
    options = Options(model=f"{NETWORKS}:random_net?seed=6&bands=4", scale=10_000)
    assert process_scenes([str(scene)], tmp_path, options)
    valid, errors, warnings = cog_validate(tmp_path / scene.name)
    assert valid and not errors and not warnings
    with rasterio.open(tmp_path / scene.name) as dataset:
        assert dataset.overviews(1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_world_in_less_than_2_gib(shared_data: Path, tmp_path: Path) -> None:
    """648 megapixels through a small network, peak memory of all processes summed."""
    scene = shared_data / "rasters" / "world_36000x18000_uint8.tif"
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))\n"
    )
    report = tmp_path / "report.json"
    command = [
        *(Path(sys.executable).with_name("bigvision"), "process", scene, "--model", f"{tmp_path}/net.py:net"),
        *("--out", tmp_path / "out", "--scale", "255", "--memory", "1900MiB", "--json", report),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (entry,) = json.loads(report.read_text())["scenes"]
    assert entry["status"] == "done" and entry["pixels"] == 648_000_000
    assert entry["peak_bytes"] < 2 * 2**30
