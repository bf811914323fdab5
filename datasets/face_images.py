"""What every source of face images has in common: reading one image, and naming the ones that cannot be read.

Legend: H, W rows and columns. An image is uint8 [H, W, 3] in RGB order.
"""

import io
from pathlib import Path, PurePath
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
        *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
# How a picture is turned upright, by the value of its EXIF tag "Orientation" (EXIF 2.32, 4.6.4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF 6.0
WHITE_IS_ZERO = 0


def printable(name: str) -> str:
    """A file's name for people: bytes of it that are no UTF-8 stand as `\\udcXX`."""
    return name.encode(errors="backslashreplace").decode()


class DamagedRecordError(Exception):
    """One image that cannot be read; `record` says which, `reason` why. Counted and left out, never fatal."""

    def __init__(self, record: str, reason: str) -> None:
        super().__init__(record, reason)  # both, so that it survives the pickling between worker processes
        self.record = printable(record)
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

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions, -1 where one can't be read."""
        ...


def is_image_file(path: Path) -> bool:
    """Whether a file is read as an image: by its suffix or, where it has none, by its first bytes.

    Hidden files (`._a.jpg`, `.DS_Store`) are none.
    """
    if path.name.startswith("."):
        return False
    suffix = PurePath(path.name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (not suffix and _starts_as_image(path))


def _starts_as_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:
        return False


def kind_of_file(path: Path) -> str:
    """What an entry is that is no image: for a count of what was left out."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "folders in an identity's folder"
    return printable(path.suffix.lower()) or "without a suffix, no image"


def decode_image(data: bytes, record: str) -> np.ndarray:
    """Decode an encoded image (JPEG, PNG, PGM, ...) to uint8 [H, W, 3].

    Of several frames the first; upright, as the EXIF orientation says; without alpha. Grey becomes three
    equal channels, 16 bits become their upper 8.

    Raises `DamagedRecordError` naming `record` when the bytes are no image, only a part of one, or numbers
    without a known range (floating point, 32-bit and signed integers).
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return np.asarray(_upright(picture, _eight_bits(picture)))
    except UnidentifiedImageError as error:
        raise DamagedRecordError(record, "no image that Pillow can identify") from error
    except Exception as error:  # a decoder given damaged bytes fails in any way
        raise DamagedRecordError(record, f"{type(error).__name__}: {error}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        raise ValueError(f"pixels of mode {picture.mode} ({picture.format}) have no known range")
    if not picture.mode.startswith("I"):
        return picture.convert("RGB")
    # Pillow scales PPM and JPEG 2000 to 16 bits; a TIFF of 12 bits keeps its own range.
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(picture).astype(np.int64)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")


def _upright(picture: Image.Image, converted: Image.Image) -> Image.Image:
    """The converted picture, turned as the original says (a damaged EXIF block says nothing)."""
    try:
        turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return converted if turn is None else converted.transpose(turn)


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
