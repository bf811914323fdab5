"""Rasters larger than memory: the peak of a whole process while it copies them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

COPY = """
import sys
from pathlib import Path
import tiling
source, kind, path = sys.argv[1:]
raster = tiling.open_raster(source)
(tiling.to_zarr if kind == "zarr" else tiling.to_cog)(raster, path)
# Not ru_maxrss: a child takes over its parent's, which a long test run has driven up.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) // 1024)
"""


def peak_mebibytes(source: Path, kind: str, path: Path) -> int:
    """Of a process of its own, libraries included (they alone take about 140 MiB)."""
    command = [sys.executable, "-c", COPY, str(source), kind, str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def enlarged(write_tif, noise, tmp_path: Path, side: int, bands: int) -> Path:
    """A VRT of `side` x `side` pixels made of a small file's: large to read, small to keep."""
    small = write_tif(noise(bands, 256, 256), "small.tif", tiled=True, blockxsize=256, blockysize=256)
    source = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename>{small}</SourceFilename>'
        f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="256" ySize="256"/>'
        f'<DstRect xOff="0" yOff="0" xSize="{side}" ySize="{side}"/></SimpleSource></VRTRasterBand>'
        for band in range(1, bands + 1)
    )
    path = tmp_path / "large.vrt"
    path.write_text(f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}">{source}</VRTDataset>')
    return path


@pytest.mark.parametrize("kind", ["zarr", "tif"])
def test_copying_takes_less_memory_than_the_raster_itself(write_tif, noise, tmp_path, kind: str) -> None:
    side, bands = 10_000, 4
    source = enlarged(write_tif, noise, tmp_path, side, bands)
    assert peak_mebibytes(source, kind, tmp_path / f"out.{kind}") < side**2 * bands / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr", "tif"])
def test_648_megapixels_copy_within_450_mebibytes(shared_data, tmp_path, kind: str) -> None:
    source = shared_data / "rasters" / "world_36000x18000_uint8.tif"
    assert peak_mebibytes(source, kind, tmp_path / f"out.{kind}") < 450


def test_strips_as_wide_as_the_raster_are_read_once(write_tif, tmp_path) -> None:
    """Strips of one row, 12000 wide: square shards would decompress each of them six times."""
    from tiling import open_raster, to_zarr

    data = np.arange(700 * 12_000, dtype="uint32").astype("uint8").reshape(1, 700, 12_000)
    source = open_raster(write_tif(data, compress="deflate", blockysize=1))
    store = to_zarr(source, tmp_path / "s.zarr")
    assert np.array_equal(store.read(), data)
    with rasterio.open(source.name) as file:
        assert file.block_shapes == [(1, 12_000)]
    import zarr

    assert zarr.open_array(f"{store.name}/0", mode="r").shards == (1, 512, 12_288)
