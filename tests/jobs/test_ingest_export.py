"""The commands that copy: stopped, refused and begun again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_scenes import random_pixels, write_scene

from bigvision.jobs.export import export
from bigvision.jobs.ingest import ingest
from tiling import RasterError, open_raster

BIGVISION = Path(sys.executable).with_name("bigvision")
JOBS = {"ingest": (ingest, "zarr"), "export": (export, "tif")}


def large_vrt(path: Path, side: int) -> Path:
    source = write_scene(path.with_name("small.tif"), random_pixels((1, 64, 64)))
    path.write_text(
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand>"
        f'<DstRect xOff="0" yOff="0" xSize="{side}" ySize="{side}"/></SimpleSource></VRTRasterBand>'
        "</VRTDataset>"
    )
    return path


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_copy_leaves_nothing(tmp_path: Path, command: str, number: signal.Signals) -> None:
    scene = large_vrt(tmp_path / "scene.vrt", 40_000)
    before = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / f"out.{JOBS[command][1]}"
    process = subprocess.Popen([BIGVISION, command, scene, out], stderr=subprocess.PIPE, text=True)
    while not (begun := list(tmp_path.glob(".out*/*"))) and process.poll() is None:
        time.sleep(0.02)
    assert begun
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in told
    assert f"bigvision: stopped: {out} isn't written" in told
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", JOBS)
def test_a_raster_that_no_disk_holds_is_refused(tmp_path: Path, command: str) -> None:
    job, suffix = JOBS[command]
    scene = large_vrt(tmp_path / "scene.vrt", 2**31 - 1)
    with pytest.raises(RasterError, match=r"out.*4,294,967,292 GiB of pixels don't fit"):
        job(str(scene), tmp_path / f"out.{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.vrt", "small.tif"]


@pytest.mark.parametrize("command", JOBS)
def test_the_flag_is_recommended_only_where_it_helps(tmp_path: Path, command: str) -> None:
    job, suffix = JOBS[command]
    scene = write_scene(tmp_path / "scene.tif", random_pixels((2, 30, 40)))
    out = tmp_path / f"out.{suffix}"
    job(str(scene), out)
    with pytest.raises(RasterError, match=r"exists already; --overwrite replaces it"):
        job(str(scene), out)
    assert np.array_equal(job(str(scene), out, overwrite=True).read(), open_raster(scene).read())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "work.txt").write_text("years")
    for place, told in ((scene, "is read to make it"), (tmp_path / "folder", "never replaced")):
        for overwrite in (False, True):
            with pytest.raises(RasterError, match=told) as refused:
                job(str(scene), place, overwrite=overwrite)
            assert "--overwrite" not in str(refused.value) and "overwrite=True" not in str(refused.value)
    assert (tmp_path / "folder" / "work.txt").read_text() == "years"


@pytest.mark.parametrize("resolution", [1e-9, 1e-300, 1e-7])
def test_a_resolution_without_end_is_refused(tmp_path: Path, resolution: float) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((1, 30, 40)))
    with pytest.raises(RasterError, match=r"scene\.tif: at a resolution of .* pixels; a raster has at most"):
        open_raster(scene, resolution=resolution)
