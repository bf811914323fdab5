"""Geometry and georeferenced storage of rasters too big for memory; never imports torch."""

from tiling.cog import to_cog
from tiling.errors import RasterError, TileError
from tiling.grid import Tile, TileGrid, shard_aligned
from tiling.memory import gdal_cache
from tiling.opening import open_raster
from tiling.pyramid import build_pyramid
from tiling.raster import Raster
from tiling.source import Profile
from tiling.zarr_store import ZarrWriter, create_zarr, resume_zarr, to_zarr

__all__ = [
    "Profile",
    "Raster",
    "RasterError",
    "Tile",
    "TileError",
    "TileGrid",
    "ZarrWriter",
    "build_pyramid",
    "create_zarr",
    "gdal_cache",
    "open_raster",
    "resume_zarr",
    "shard_aligned",
    "to_cog",
    "to_zarr",
]
