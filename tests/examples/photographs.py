"""Small four-band photographs that examples are tried on."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin


def photograph(seed: int, light: float = 1.0, shape: tuple[int, int] = (150, 130)) -> np.ndarray:
    """Green grainy plants on the left half, smooth grey ground on the right: uint8 [4, H, W]."""
    draw = np.random.default_rng(seed)
    height, width = shape
    scene = np.full((4, *shape), 90.0)
    scene[1, :, : width // 2] += draw.uniform(10, 60, (height, width // 2))
    scene[3, :, : width // 2] += 90
    scene += draw.uniform(-3, 3, scene.shape)
    return (scene * light).clip(1, 255).astype(np.uint8)


def write_scene(path: Path, pixels: np.ndarray) -> Path:
    """A GeoTIFF of pixels [4, H, W] in which 0 is no data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    about = {
        "crs": "EPSG:26914",
        "transform": from_origin(0, 0, 5, 5),
        "photometric": "minisblack",
        "nodata": 0,
        "dtype": "uint8",
    }
    with rasterio.open(path, "w", driver="GTiff", count=bands, height=height, width=width, **about) as file:
        file.write(pixels)
    return path


def dates(folder: Path, shape: tuple[int, int] = (150, 130)) -> list[Path]:
    """Two older dates and a newest, each in a light of its own, in no order."""
    lights = {"20200101": 0.8, "20180101": 1.0, "20190101": 0.6}
    return [
        write_scene(folder / f"a_{date}.tif", photograph(int(date), light, shape))
        for date, light in lights.items()
    ]
