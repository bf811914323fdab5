"""Random crops of labelled scenes, drawn by counting: each depends on (seed, step, place) alone.

Training that resumes at step n, or on another number of ranks, therefore sees the crops it would have seen.

Shapes: N crops, C bands, s rows and columns of a crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.pairs import IGNORE, LabelledScene
from datasets.streams import Use, stream


@dataclass(frozen=True)
class Crop:
    """One crop: the scene's index, the window in it, and which symmetry of the square (0..7) turns it."""

    scene: int
    window: Window
    symmetry: int


def draw_crop(
    sizes: Sequence[tuple[int, int]], size: int, *, seed: int, step: int, place: int, augment: bool = True
) -> Crop:
    """Crop `place` of the batch at `step`: scenes by area, windows uniform within, the square's symmetries.

    sizes: (height, width) of each scene; a scene smaller than `size` is taken whole along that side.
    """
    generator = stream(Use.CROP, seed, step, place)
    areas = np.array([height * width for height, width in sizes], np.float64)
    scene = int(np.searchsorted(np.cumsum(areas), generator.random() * areas.sum(), side="right"))
    height, width = sizes[scene]
    rows, columns = min(size, height), min(size, width)
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    symmetry = int(generator.integers(8)) if augment else 0
    return Crop(scene, Window(left, top, columns, rows), symmetry)


def read_crops(
    scenes: Sequence[LabelledScene], crops: Sequence[Crop], size: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Images [N, C, s, s] and classes [N, s, s] of crops; what a small scene lacks is 0, and IGNORE."""
    images = np.zeros((len(crops), scenes[0].shape[0], size, size), np.float32)
    targets = np.full((len(crops), size, size), IGNORE, np.uint8)
    for place, crop in enumerate(crops):
        rows, columns = crop.window.height, crop.window.width
        images[place, :, :rows, :columns], targets[place, :rows, :columns] = scenes[crop.scene].read(
            crop.window
        )
        images[place] = turn(images[place], crop.symmetry)
        targets[place] = turn(targets[place], crop.symmetry)
    return images, targets


def turn(square: NDArray[np.generic], symmetry: int) -> NDArray[np.generic]:
    """One of the eight symmetries of a square [..., s, s]: quarter turns, the last four after a flip."""
    turned = square[..., ::-1] if symmetry >= 4 else square
    return np.rot90(turned, symmetry % 4, axes=(-2, -1))


def shift_tones(
    images: NDArray[np.float32], strength: float, *, seed: int, step: int, places: Sequence[int]
) -> NDArray[np.float32]:
    """Other light and season: normalised images [N, C, s, s] with random gains and offsets, 0 staying 0.

    Each crop gets a gain and an offset, each of its bands another, together within `strength` of 1 and 0;
    zeros are missing pixels. Crop i's depend on (seed, step, places[i]) alone.
    """
    shifted = np.empty_like(images)
    for image, place, result in zip(images, places, shifted, strict=True):
        generator = stream(Use.TONES, seed, step, place)
        common = generator.uniform(-0.5, 0.5, (2, 1, 1, 1))
        own = generator.uniform(-0.5, 0.5, (2, len(image), 1, 1))
        gain, offset = ((common + own) * strength).astype(np.float32)
        np.multiply(image, 1 + gain, out=result)
        np.add(result, offset, out=result, where=image != 0)
    return shifted
