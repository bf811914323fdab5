"""How a raster lies in a zarr store: chunks, shards, and the arrays of a level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tiling.conventions import describe
from tiling.errors import RasterError
from tiling.grid import Pair
from tiling.raster import Raster
from tiling.source import Profile

if TYPE_CHECKING:
    import zarr

_CHUNK_BYTES = 4 * 2**20
_SHARD_BYTES = 64 * 2**20


def create_level(
    group: zarr.Group, name: str, profile: Profile, chunks: tuple[int, ...], shards: tuple[int, ...]
) -> zarr.Array[Any]:
    """An empty array [B, H, W] of a group, with the attributes of `profile`."""
    from zarr.codecs import BloscCodec

    shuffle: Any = "shuffle" if profile.dtype.itemsize > 1 else "noshuffle"
    return group.create_array(
        name,
        shape=profile.shape,
        dtype=profile.dtype,
        chunks=chunks,
        shards=shards,
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle=shuffle),
        fill_value=profile.dtype.type(0 if profile.nodata is None else profile.nodata),
        dimension_names=("band", "y", "x"),
        attributes=describe(profile),
    )


def create_mask(
    group: zarr.Group, level: str, size: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...]
) -> zarr.Array[Any]:
    """An empty mask [H, W] or [B, H, W] for one level: 1 where pixels have data."""
    from zarr.codecs import BloscCodec

    return group.require_group("mask").create_array(
        level,
        shape=size,
        dtype="uint8",
        chunks=chunks[-len(size) :],
        shards=shards[-len(size) :],
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
        fill_value=0,
        dimension_names=("band", "y", "x")[-len(size) :],
    )


def layout(
    shape: tuple[int, int, int], dtype: np.dtype[Any], chunk: int, shard: Pair | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Chunks of at most about 4 MiB, all bands together where they fit; shards of all bands."""
    bands, height, width = shape
    if chunk < 1:
        raise RasterError(f"chunk must be at least 1 pixel, got {chunk}")
    rows, columns = min(chunk, height), min(chunk, width)
    together = max(1, min(bands, _CHUNK_BYTES // (rows * columns * dtype.itemsize)))
    wanted = (shard, shard) if isinstance(shard, int) else shard or _square(bands * dtype.itemsize, chunk)
    if min(wanted) < 1:
        raise RasterError(f"shard must be at least 1 pixel, got {wanted}")
    tall = _round_up(min(wanted[0], height), rows)
    wide = _round_up(min(wanted[1], width), columns)
    return (together, rows, columns), (_round_up(bands, together), tall, wide)


def _square(pixel_bytes: int, chunk: int) -> tuple[int, int]:
    """4, 2 or 1 chunks a side: a writer holds a shard in memory, so it stays within 64 MiB."""
    sides = (side for side in (4, 2) if (side * chunk) ** 2 * pixel_bytes <= _SHARD_BYTES)
    side = next(sides, 1) * chunk
    return side, side


def like_source(raster: Raster, chunk: int) -> Pair | None:
    """Shards of full rows for a source that stores full rows, which no one then has to read many times."""
    bands, height, width = raster.shape
    rows = min(chunk, height)
    strips = raster.block_shape[1] >= width > 4 * chunk
    fits = rows * width * bands * raster.dtype.itemsize <= 4 * _SHARD_BYTES
    return (rows, width) if strips and fits else None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
