"""GDAL's block cache, bounded: by default it takes 5 % of the machine's memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import rasterio

CACHE_BYTES = 128 * 2**20


@contextmanager
def gdal_cache(size: int = CACHE_BYTES) -> Iterator[None]:
    """Within this block GDAL keeps at most `size` bytes of blocks, in the whole process."""
    with rasterio.Env(GDAL_CACHEMAX=size):
        yield
