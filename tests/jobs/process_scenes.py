"""Small georeferenced scenes and the whole-image result that everything is compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.typing import NDArray
from torch import Tensor, nn

TRANSFORM = Affine(10, 0, 500000, 0, -10, 4600000)


def write_scene(path: Path, pixels: NDArray[Any], **profile: Any) -> Path:
    """`pixels` [C, H, W] as a GeoTIFF in UTM; a fourth band is no alpha."""
    bands, height, width = pixels.shape
    about = {"crs": "EPSG:32633", "transform": TRANSFORM, "photometric": "MINISBLACK"} | profile
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=pixels.dtype, **about
    ) as file:
        file.write(pixels)
    return path


def random_pixels(shape: tuple[int, int, int], seed: int = 0, dtype: str = "uint8") -> NDArray[Any]:
    """Values 1 to 200, so that 0 and 255 can mean nodata."""
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


@torch.no_grad()
def whole_image(model: nn.Module, image: NDArray[Any], stride: int) -> NDArray[np.float32]:
    """[C, H, W] -> [K, H, W]: padded below and right with 0 to whole strides, run whole, cropped."""
    height, width = image.shape[1:]
    padded = np.zeros(
        (image.shape[0], -(-height // stride) * stride, -(-width // stride) * stride), np.float32
    )
    padded[:, :height, :width] = image
    output: Tensor | dict[str, Tensor] = model.eval()(torch.from_numpy(padded)[None])
    output = output["out"] if isinstance(output, dict) else output
    return output[0, :, :height, :width].numpy()


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        return file.read()
