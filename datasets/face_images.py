"""What every source of face images has in common: reading one image, and naming the ones that cannot be read.

Legend: H, W rows and columns. An image is uint8 [H, W, 3] in RGB order.
"""

import io
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class DamagedRecordError(Exception):
    """One image that cannot be read; `record` says which, `reason` why. Counted and left out, never fatal."""

    def __init__(self, record: str, reason: str) -> None:
        super().__init__(record, reason)  # both, so that it survives the pickling between worker processes
        self.record = record
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.record}: {self.reason}"


@runtime_checkable
class FaceSource(Protocol):
    """Labelled face images with random access, so that any order can be replayed from any position."""

    num_classes: int

    def __len__(self) -> int:
        """Count the images."""
        ...

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        ...


def decode_image(data: bytes, record: str) -> np.ndarray:
    """Decode an encoded image (JPEG, PNG, PGM, ...) to uint8 [H, W, 3]; grey becomes three equal channels.

    Raises `DamagedRecordError` naming `record` when the bytes are no image, or only a part of one.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedRecordError(record, f"{type(error).__name__}: {error}") from error


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """Centre-crop uint8 [H, W, 3] to a square and resize it to [size, size, 3]; a crop of that size is
    untouched.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
