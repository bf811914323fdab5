"""What goes wrong with rasters, said in one sentence that names the file and the value."""


class RasterError(ValueError):
    """A raster can't be opened, read or written as asked; the message names the file and the value."""


class TileError(RuntimeError):
    """The function given to `map_tiles` failed on one tile; the message names the tile."""
