"""A raster into sharded, multiscale zarr."""

from pathlib import Path

from tiling import Raster, open_raster, to_zarr


def ingest(scene: str, out: Path, *, overwrite: bool = False) -> Raster:
    """Copy `scene` into the zarr store `out`; ValueError (RasterError) where it can't be read or written."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists already; --overwrite replaces it")
    return to_zarr(open_raster(scene), out, overwrite=overwrite)
