"""A disk that takes no more: one sentence, and nothing left behind."""

import subprocess
import sys

import pytest

COPY = """
import resource, signal, sys
import tiling
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
raster = tiling.open_raster(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    (tiling.to_zarr if sys.argv[2] == "zarr" else tiling.to_cog)(raster, sys.argv[3])
except (tiling.RasterError, OSError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("limit", [0, 5_000, 40_000, 300_000])
@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_a_file_that_cannot_grow_fails_with_a_sentence_and_leaves_nothing(
    write_tif, noise, tmp_path, kind: str, limit: int
) -> None:
    source = write_tif(noise(1, 700, 700))
    command = [sys.executable, "-c", COPY, str(source), kind, str(tmp_path / f"out.{kind}"), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"out.{kind}" in run.stdout and run.stdout.startswith("RasterError"), (run.stdout, run.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]
