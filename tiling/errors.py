"""What goes wrong with rasters, said in one sentence that names the file and the value."""

from tiling.addresses import without_secrets


class RasterError(ValueError):
    """A raster can't be opened, read or written as asked; the message names the file and the value.

    Of a URL it shows neither credentials nor query.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class TileError(RuntimeError):
    """The function given to `map_tiles` failed on one tile; the message names the tile."""
