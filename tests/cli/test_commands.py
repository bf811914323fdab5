"""The command line: quick to answer, one sentence for an error, and its status."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import typer
from affine import Affine

from bigvision.cli.process import band_numbers

BIGVISION = Path(sys.executable).with_name("bigvision")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIGVISION, *arguments], capture_output=True, text=True)


def write(path: Path) -> Path:
    pixels = np.arange(3 * 40 * 50, dtype=np.uint16).reshape(3, 40, 50)
    profile = {"crs": "EPSG:32633", "transform": Affine(10, 0, 5e5, 0, -10, 4.6e6), "nodata": 0}
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=40, width=50, dtype="uint16", **profile
    ) as f:
        f.write(pixels)
    return path


def test_help_imports_no_job_and_no_torch() -> None:
    code = (
        "import sys; import bigvision.cli; "
        "print(*[name for name in sys.modules if name in ('torch', 'rasterio', 'bigvision.jobs')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
    assert "process" in run("--help").stdout


def test_ingest_and_export_are_inverse(tmp_path: Path) -> None:
    scene = write(tmp_path / "scene.tif")
    assert run("ingest", scene, tmp_path / "scene.zarr").returncode == 0
    assert (
        "scene.zarr: exists already; --overwrite replaces it"
        in run("ingest", scene, tmp_path / "scene.zarr").stderr
    )
    assert run("ingest", scene, tmp_path / "scene.zarr", "--overwrite").returncode == 0
    assert run("export", tmp_path / "scene.zarr", tmp_path / "back.tif").returncode == 0
    with rasterio.open(scene) as one, rasterio.open(tmp_path / "back.tif") as other:
        assert (one.read() == other.read()).all()
        assert (one.crs, one.transform, one.nodata) == (other.crs, other.transform, other.nodata)


def test_an_error_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    for arguments in (
        ("ingest", tmp_path / "absent.tif", tmp_path / "out.zarr"),
        ("process", tmp_path / "*.tif", "--model", "m:f", "--out", tmp_path / "out"),
        ("process", "a.tif", "--model", "m:f", "--out", tmp_path / "out", "--memory", "none"),
        ("process", "a.tif", "--model", "m:f", "--out", tmp_path / "out", "--tolerance", "2"),
        ("process", "a.tif", "--model", "m:f", "--out", tmp_path / "out", "--json", tmp_path / "no/r.json"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1 and "bigvision: " in done.stderr


@pytest.mark.parametrize(("bands", "told"), [("1,x", "'1,x'"), ("1.5,2,3", "'1.5,2,3'"), ("", "''")])
def test_bands_are_whole_numbers(bands: str, told: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"{told} is not a comma-separated list of band numbers"):
        band_numbers(bands)
    assert band_numbers("4,1,2") == (4, 1, 2) and band_numbers(None) is None


def test_process_reports_and_says_what_is_done_already(tmp_path: Path) -> None:
    scene = write(tmp_path / "scene.tif")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(): return nn.Conv2d(3, 2, 3, padding=1)\n"
    )
    command = ("process", scene, "--model", f"{tmp_path}/net.py:net", "--out", tmp_path / "out")
    first, second = run(*command), run(*command)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "done" in first.stdout and "already done" in second.stdout
    third = run(*command, "--scale", "255")
    assert third.returncode == 1 and "--overwrite" in third.stdout
