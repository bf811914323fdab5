"""A zarr store, or any raster, into a Cloud Optimized GeoTIFF."""

import sys
from pathlib import Path

from tiling import Raster, open_raster, to_cog
from tiling.replaceable import check_result, not_a_tiff


def export(store: str, out: Path, *, overwrite: bool = False) -> Raster:
    """Write `store` as the COG `out`; ValueError (RasterError) where it can't be read or written."""
    raster = open_raster(store)
    check_result(out, raster, not_a_tiff, overwrite, advice="--overwrite replaces it")
    try:
        return to_cog(raster, out, overwrite=overwrite)
    except KeyboardInterrupt:
        print(f"bigvision: stopped: {out} isn't written, and nothing of it is kept", file=sys.stderr)
        raise
