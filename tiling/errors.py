"""What goes wrong with rasters, said in one sentence that names the file and the value."""

from collections.abc import Iterator
from contextlib import contextmanager

from tiling.addresses import without_secrets


class RasterError(ValueError):
    """A raster can't be opened, read or written as asked; the message names the file and the value.

    Of a URL it shows neither credentials nor query.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class TileError(RuntimeError):
    """The function given to `map_tiles` failed on one tile; the message names the tile."""


@contextmanager
def named(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong with the raster `name` becomes one RasterError: `name: what: why`.

    Damaged headers and metadata make GDAL, zarr and numpy raise errors of every kind.
    """
    try:
        yield
    except (RasterError, MemoryError):
        raise
    except Exception as error:
        raise RasterError(f"{name}: {what}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """What is at the bottom of an error, on one line; with its kind where the text alone would say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError) or type(error).__module__.startswith(("rasterio", "zarr"))
    return text if text and plain else f"{type(error).__name__} {text}".strip()
