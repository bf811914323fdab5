"""Geometry and georeferenced storage of rasters too big for memory; never imports torch."""

from tiling.blend import Blender, blend_rows, window_weights
from tiling.cog import to_cog
from tiling.errors import RasterError, TileError
from tiling.grid import Tile, TileGrid, shard_aligned
from tiling.mapping import connect, map_tiles
from tiling.memory import gdal_cache
from tiling.opening import open_raster
from tiling.pyramid import build_pyramid
from tiling.raster import Raster
from tiling.source import Profile
from tiling.zarr_store import ZarrWriter, create_zarr, resume_zarr, to_zarr

__all__ = [
    "Blender",
    "Profile",
    "Raster",
    "RasterError",
    "Tile",
    "TileError",
    "TileGrid",
    "ZarrWriter",
    "blend_rows",
    "build_pyramid",
    "connect",
    "create_zarr",
    "gdal_cache",
    "map_tiles",
    "open_raster",
    "resume_zarr",
    "shard_aligned",
    "to_cog",
    "to_zarr",
    "window_weights",
]
