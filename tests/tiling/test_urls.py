"""Rasters behind a URL, read by ranges from a server on this machine."""

import numpy as np
import pytest
from rasterio.windows import Window

from tiling import RasterError, open_raster, to_cog


def test_a_cog_behind_a_url_is_read_in_parts(write_tif, noise, tmp_path, server: str) -> None:
    data = noise(2, 1500, 1500)
    to_cog(open_raster(write_tif(data)), tmp_path / "cog.tif", blocksize=256)
    raster = open_raster(f"{server}/cog.tif")
    window = Window(700, 300, 50, 40)
    assert np.array_equal(raster.read(window), data[:, *window.toslices()])
    sent = sum(int(line) for line in (tmp_path / "sent").read_text().split())
    assert 0 < sent < (tmp_path / "cog.tif").stat().st_size / 2


def test_a_url_that_leads_nowhere_is_named(server: str) -> None:
    with pytest.raises(
        RasterError, match=r"http://127\.0\.0\.1:\d+/none\.tif: not a raster that can be read"
    ):
        open_raster(f"{server}/none.tif")
