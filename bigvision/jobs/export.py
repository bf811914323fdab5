"""A zarr store, or any raster, into a Cloud Optimized GeoTIFF."""

from pathlib import Path

from tiling import Raster, open_raster, to_cog


def export(store: str, out: Path, *, overwrite: bool = False) -> Raster:
    """Write `store` as the COG `out`; ValueError (RasterError) where it can't be read or written."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists already; --overwrite replaces it")
    return to_cog(open_raster(store), out, overwrite=overwrite)
