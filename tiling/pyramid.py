"""Coarser levels of a zarr raster, each half as fine as the last and made from it shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling.conventions import describe_levels
from tiling.errors import RasterError, named
from tiling.grid import TileGrid
from tiling.source import Array, Profile, avoid, not_missing
from tiling.zarr_source import ZarrSource

SMALLEST = 256
METHODS = ("average", "nearest", "mode")


def build_pyramid(
    path: str | PathLike[str], *, method: str = "auto", progress: Callable[[int, int], object] | None = None
) -> int:
    """Add levels to a zarr raster until its longer side is at most 256 pixels; returns how many it has now.

    method: "average" of the pixels with data, "nearest" (the upper left of four), "mode" (the most frequent
        of four, the first of equals); "auto" takes "mode" where there is a colour table, else "average".
    progress: called with (shards done, shards in all). Levels that are there already are made again.
    """
    with named(str(path), "its pyramid can't be made"):
        return _build(path, method, progress)


def _build(path: str | PathLike[str], method: str, progress: Callable[[int, int], object] | None) -> int:
    import zarr

    source = ZarrSource(str(path))
    profile = source.profile
    chosen = ("mode" if profile.colormap else "average") if method == "auto" else method
    if chosen not in METHODS:
        raise RasterError(f"{path}: pyramid method {method!r} is none of {', '.join(METHODS)}")
    group = zarr.open_group(Path(path), mode="r+")
    sizes = level_sizes(profile.shape[1], profile.shape[2])
    grids = [TileGrid(*size, _shard(group["0"], size)) for size in sizes[1:]]
    total, done = sum(len(grid) for grid in grids), 0
    for number, (size, grid) in enumerate(zip(sizes[1:], grids, strict=True), 1):
        _create(group, profile, number, size)
        for tile in grid:
            _fill(group, number, tile.core, chosen, profile.nodata)
            done += 1
            if progress is not None:
                progress(done, total)
    group.attrs.update(describe_levels(profile, sizes, chosen))
    return len(sizes)


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of every level, finest first: halves, rounded up, down to 256 pixels."""
    sizes = [(height, width)]
    while max(sizes[-1]) > SMALLEST:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def halve(
    data: Array, valid: NDArray[np.bool_], method: str, nodata: float | None
) -> tuple[Array, NDArray[np.bool_]]:
    """Half the rows and columns (rounded up) of `data` [B, H, W], from its pixels with data.

    valid: bool [B, H, W]. Returns pixels and which of them have data: those with any under them.
    """
    four, shown = _quads(data), _quads(valid)
    some: NDArray[np.bool_] = np.asarray(shown.any(axis=0))
    if method == "nearest":
        out, some = four[0], shown[0]
    elif method == "average":
        out = _average(four, shown, data.dtype)
        avoid(out, some, nodata)
    else:
        # How often each of the four occurs among those with data; the first of the most frequent wins.
        votes = np.stack([((four == value) & shown).sum(axis=0, dtype=np.uint8) for value in four])
        votes[~shown] = 0
        out = np.take_along_axis(four, votes.argmax(axis=0)[None], axis=0)[0]
    out = np.where(some, out, np.asarray(0 if nodata is None else nodata, data.dtype))
    return out, some


def _average(four: Array, shown: NDArray[np.bool_], dtype: np.dtype[Any]) -> Array:
    precise = np.float64 if dtype.itemsize > 2 else np.float32
    total = np.where(shown, four, 0).sum(axis=0, dtype=precise)
    mean = total / np.maximum(shown.sum(axis=0), 1)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(mean, dtype)
    return np.asarray(np.rint(mean), dtype)


def _quads(data: Array) -> Array:
    """[B, H, W] -> [4, B, ceil(H / 2), ceil(W / 2)]; an odd last row or column stands for itself twice."""
    height, width = data.shape[1:]
    if height % 2 or width % 2:
        data = np.pad(data, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return np.stack([data[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def _create(group: Any, profile: Profile, number: int, size: tuple[int, int]) -> None:
    from tiling.zarr_layout import create_level, create_mask

    finest = group["0"]
    level = replace(
        profile,
        shape=(profile.shape[0], *size),
        transform=profile.transform @ Affine.scale(2.0**number),
        metadata=profile.metadata.on_grid(Affine.scale(2.0**number)),
    )
    rows, columns = (min(c, s) for c, s in zip(finest.chunks[1:], size, strict=True))
    chunks = (finest.chunks[0], rows, columns)
    shards = (finest.shards[0], *_shard(finest, size))
    for name in (str(number), f"mask/{number}"):
        if name in group:
            del group[name]
    create_level(group, str(number), level, chunks, shards)
    if "mask/0" in group:
        create_mask(group, str(number), (*group["mask/0"].shape[:-2], *size), chunks, shards)


def _shard(finest: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The finest level's shard, no larger than a level of this size needs."""
    shard = []
    for chunk, full, length in zip(finest.chunks[1:], finest.shards[1:], size, strict=True):
        small = min(chunk, length)
        shard.append(-(-min(full, length) // small) * small)
    return shard[0], shard[1]


def _fill(group: Any, number: int, shard: Window, method: str, nodata: float | None) -> None:
    """One shard of a level from the 2 x 2 larger window of the finer one, chunk by chunk."""
    finer, coarser = group[str(number - 1)], group[str(number)]
    finer_mask, coarser_mask = group.get(f"mask/{number - 1}"), group.get(f"mask/{number}")
    out = np.empty((finer.shape[0], shard.height, shard.width), finer.dtype)
    by_band = coarser_mask is not None and coarser_mask.ndim == 3
    shown = np.empty(out.shape if by_band else out.shape[1:], np.uint8)
    for piece in TileGrid(shard.height, shard.width, coarser.chunks[1:]):
        here = piece.core.toslices()
        start = (shard.row_off, shard.col_off)
        twice = [slice(2 * (a + s.start), 2 * (a + s.stop)) for a, s in zip(start, here, strict=True)]
        data = np.asarray(finer[:, *twice])
        valid = not_missing(data, (nodata,) * data.shape[0])
        if finer_mask is not None:
            valid &= np.asarray(finer_mask[..., *twice]) > 0
        out[:, *here], some = halve(data, valid, method, nodata)
        shown[..., *here] = some if by_band else some.any(axis=0)
    coarser[:, *shard.toslices()] = out
    if coarser_mask is not None:
        coarser_mask[..., *shard.toslices()] = shown
