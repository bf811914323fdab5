"""Whether a TIFF has all its blocks: GDAL may close a file that it couldn't finish without a word."""

from collections.abc import Iterable
from pathlib import Path

from rasterio.enums import Interleaving
from rasterio.io import DatasetReader

from tiling.errors import RasterError


def check_ends(path: str, dataset: DatasetReader) -> None:
    """RasterError where the first or last block of a TIFF lies beyond its end: a file cut off."""
    if dataset.driver != "GTiff" or not Path(path).is_file():
        return
    across, down = _blocks(dataset)
    _check(path, dataset, dataset.count, {(0, 0), (across - 1, down - 1)}, sparse=True)


def check_all(path: str, dataset: DatasetReader) -> None:
    """RasterError, about `path`, where a block of full resolution is missing or beyond the file's end."""
    across, down = _blocks(dataset)
    together = dataset.interleaving == Interleaving.pixel
    for band in range(1, 2 if together else dataset.count + 1):
        _check(path, dataset, band, ((x, y) for y in range(down) for x in range(across)), sparse=False)


def _blocks(dataset: DatasetReader) -> tuple[int, int]:
    rows, columns = dataset.block_shapes[0]
    return -(-dataset.width // columns), -(-dataset.height // rows)


def _check(
    path: str, dataset: DatasetReader, band: int, blocks: Iterable[tuple[int, int]], *, sparse: bool
) -> None:
    length = Path(dataset.name).stat().st_size
    for x, y in blocks:
        offset = int(dataset.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=band) or 0)
        size = int(dataset.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=band) or 0)
        if offset + size > length:
            raise RasterError(
                f"{path}: truncated: block ({x}, {y}) ends at byte {offset + size}, the file at {length}"
            )
        if not sparse and not (offset and size):
            raise RasterError(f"{path}: block ({x}, {y}) was not written")
