"""Whether a TIFF has all its blocks: GDAL may close a file that it couldn't finish without a word."""

from collections.abc import Iterable
from pathlib import Path

from rasterio.enums import Interleaving
from rasterio.io import DatasetReader

from tiling.directories import check_directories
from tiling.errors import RasterError


def check_ends(path: str, dataset: DatasetReader) -> None:
    """RasterError where anything that a TIFF names lies beyond its end: a file cut off."""
    if dataset.driver == "GTiff" and Path(path).is_file():
        check_directories(path)


def check_all(path: str, dataset: DatasetReader) -> None:
    """RasterError, about `path`, where a block of full resolution is missing or beyond the file's end."""
    across, down = _blocks(dataset)
    together = dataset.interleaving == Interleaving.pixel
    for band in range(1, 2 if together else dataset.count + 1):
        _check(path, dataset, band, ((x, y) for y in range(down) for x in range(across)))


def _blocks(dataset: DatasetReader) -> tuple[int, int]:
    rows, columns = dataset.block_shapes[0]
    return -(-dataset.width // columns), -(-dataset.height // rows)


def _check(path: str, dataset: DatasetReader, band: int, blocks: Iterable[tuple[int, int]]) -> None:
    length = Path(dataset.name).stat().st_size
    for x, y in blocks:
        offset = int(dataset.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=band) or 0)
        size = int(dataset.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=band) or 0)
        if offset + size > length:
            raise RasterError(
                f"{path}: truncated: block ({x}, {y}) ends at byte {offset + size}, the file at {length}"
            )
        if not (offset and size):
            raise RasterError(f"{path}: block ({x}, {y}) was not written")
