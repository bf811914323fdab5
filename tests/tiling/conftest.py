"""Small rasters to test on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

sys.path.insert(0, str(Path(__file__).parent))  # helpers that tests import by name

WriteTif = Callable[..., Path]


@pytest.fixture
def write_tif(tmp_path: Path) -> WriteTif:
    """Writes an array [B, H, W] as a GeoTIFF in EPSG:32633 with 10 m pixels, unless told otherwise."""

    def write(data: np.ndarray, name: str = "scene.tif", **options: Any) -> Path:
        mask, names = options.pop("mask", None), options.pop("names", None)
        bands, height, width = data.shape
        about = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)} | options
        # Otherwise GDAL takes the fourth of four uint8 bands for alpha.
        about = {"photometric": "minisblack", "alpha": "no"} | about
        path = tmp_path / name
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(
                path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=data.dtype, **about
            ) as file,
        ):
            file.write(data)
            if mask is not None:
                file.write_mask(mask)
            for number, text in enumerate(names or (), 1):
                file.set_band_description(number, text)
        return path

    return write


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """Random pixels from 1 to 200, the same for the same shape."""

    def make(bands: int = 3, height: int = 70, width: int = 90, dtype: str = "uint8") -> np.ndarray:
        random = np.random.default_rng(bands * 7 + height * 3 + width)
        return random.integers(1, 200, (bands, height, width)).astype(dtype)

    return make
