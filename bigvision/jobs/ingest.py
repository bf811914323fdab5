"""A raster into sharded, multiscale zarr."""

import sys
from pathlib import Path

from tiling import Raster, open_raster, to_zarr
from tiling.replaceable import check_result, not_a_store


def ingest(scene: str, out: Path, *, overwrite: bool = False) -> Raster:
    """Copy `scene` into the zarr store `out`; ValueError (RasterError) where it can't be read or written."""
    raster = open_raster(scene)
    check_result(out, raster, not_a_store, overwrite, advice="--overwrite replaces it")
    try:
        return to_zarr(raster, out, overwrite=overwrite)
    except KeyboardInterrupt:
        print(f"bigvision: stopped: {out} isn't written, and nothing of it is kept", file=sys.stderr)
        raise
