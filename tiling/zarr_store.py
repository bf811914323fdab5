"""Rasters as sharded zarr v3 stores that several processes may fill at once.

A store is a group: array "0" is the raster [B, H, W], "1", "2", ... its pyramid, "mask/0", ... which pixels
have data where no nodata value can say so. A shard is one file, so two writers must never touch the same one:
`ZarrWriter.write` takes whole shards only, and `ZarrWriter.grid` gives tiles made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from affine import Affine
from numpy.typing import DTypeLike, NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from tiling.conventions import describe
from tiling.errors import RasterError, named
from tiling.grid import Margins, Pair, TileGrid, shard_aligned
from tiling.memory import gdal_cache
from tiling.metadata import Metadata
from tiling.missing import common_value
from tiling.publish import begin, check_free, discard, followed, publish, writing
from tiling.raster import Raster
from tiling.replaceable import check_result, not_a_store
from tiling.source import Array, Colormap, Profile, holds
from tiling.zarr_layout import create_level, create_mask, layout, like_source
from tiling.zarr_source import ZarrSource

if TYPE_CHECKING:
    import zarr

Progress = Callable[[int, int], object]
CHUNK = 512


@dataclass(frozen=True)
class ZarrWriter:
    """A store under construction at `staging`, to be published as `path`; picklable, one for every process.

    As a context manager it publishes the store, or removes it where the block fails.
    """

    path: Path
    staging: Path
    profile: Profile
    shard: tuple[int, int]
    overwrite: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self.profile.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """What `write` stores."""
        return self.profile.dtype

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        import zarr

        return zarr.open_array(self.staging / "0", mode="r+")

    @cached_property
    def _mask(self) -> zarr.Array[Any] | None:
        import zarr

        at = self.staging / "mask" / "0"
        return zarr.open_array(at, mode="r+") if at.is_dir() else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def grid(self, tile: Pair | None = None, halo: Margins = 0, align: Pair = 1) -> TileGrid:
        """Tiles whose cores never share a shard: `tile` rounded up to whole shards, by default one shard."""
        return shard_aligned(self.shape[1], self.shape[2], self.shard, tile, halo, align)

    def write(self, data: Array, window: Window, *, mask: NDArray[np.bool_] | None = None) -> None:
        """Store `data` [B, H, W] in a window of whole shards (or up to the raster's edge).

        mask: bool [H, W] or [B, H, W], False where a pixel has no data; pixels get the nodata value, or the
        store's mask.
        Raises RasterError for a window that cuts a shard, another shape, or a dtype that would lose values.
        """
        self._check(data, window)
        rows, columns = window.toslices()
        if mask is not None and self._mask is None and self.profile.nodata is None:
            raise RasterError(f"{self.path}: has no nodata value and no mask to store missing pixels in")
        if mask is not None and self.profile.nodata is not None:
            data = np.where(mask, data, np.asarray(self.profile.nodata, self.dtype))
        with writing(self.path):
            if self._mask is not None:
                size = (*self._mask.shape[:-2], *data.shape[1:])
                shown = np.ones(size, bool) if mask is None else np.broadcast_to(mask, size)
                self._mask[..., rows, columns] = shown.astype(np.uint8)
            self._array[:, rows, columns] = data

    def read(self, window: Window) -> Array:
        """Pixels [B, H, W] written so far; nodata or 0 elsewhere."""
        rows, columns = window.toslices()
        return np.asarray(self._array[:, rows, columns])

    def raster(self) -> Raster:
        """The unfinished store as a raster, for reading back what is there."""
        return Raster(ZarrSource(str(self.staging)))

    def publish(
        self,
        *,
        pyramid: str | None = "auto",
        tags: dict[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Raster:
        """Build the pyramid and give the store its final name.

        pyramid: "average", "nearest", "mode", "auto" as `build_pyramid` has them, or None.
        tags: added to those that `create_zarr` was given.
        """
        from tiling.pyramid import build_pyramid

        with writing(self.path):
            for torn in self.staging.rglob("*.partial"):  # a shard whose writer was killed
                torn.unlink()
            if tags:
                described = describe(replace(self.profile, tags={**self.profile.tags, **tags}))
                group = _open_group(self.staging)
                for node in (group, group["0"]):
                    node.attrs.update(described)
            if pyramid is not None:
                build_pyramid(self.staging, method=pyramid, progress=progress)
            check_free(self.path, self.overwrite, not_a_store)
            publish(self.staging, self.path, replace=self.overwrite)
            self._tidy()
        return Raster(ZarrSource(str(self.path)))

    def discard(self) -> None:
        """Remove the unfinished store."""
        discard(self.staging)
        self._tidy()

    def _tidy(self) -> None:
        if self.staging.parent.name.endswith(".partial"):
            discard(self.staging.parent)

    def __enter__(self) -> ZarrWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.publish()
        else:
            self.discard()

    def _check(self, data: Array, window: Window) -> None:
        bands, height, width = self.shape
        if data.shape != (bands, window.height, window.width):
            raise RasterError(
                f"{self.path}: {window} takes {(bands, window.height, window.width)}, got {data.shape}"
            )
        floats = np.issubdtype(self.dtype, np.floating)
        if not np.can_cast(data.dtype, self.dtype, "same_kind" if floats else "safe"):
            raise RasterError(f"{self.path}: {data.dtype} pixels would lose values as {self.dtype}")
        spans = ((window.row_off, window.height, height), (window.col_off, window.width, width))
        for (start, size, whole), shard in zip(spans, self.shard, strict=True):
            stop = start + size
            if start < 0 or stop > whole or start % shard or (stop % shard and stop != whole):
                raise RasterError(
                    f"{self.path}: {window} isn't made of whole shards of {self.shard[0]} x {self.shard[1]}"
                )


def create_zarr(
    path: str | PathLike[str],
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    *,
    crs: CRS | str | int | None = None,
    transform: Affine | None = None,
    nodata: float | None = None,
    band_names: tuple[str, ...] | None = None,
    colormap: Colormap | None = None,
    tags: dict[str, str] | None = None,
    metadata: Metadata | None = None,
    mask: bool | Literal["bands"] = False,
    chunk: int = CHUNK,
    shard: Pair | None = None,
    staging: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> ZarrWriter:
    """An empty store to fill, shard by shard and from any number of processes; `publish` completes it.

    shape: (bands, height, width). nodata: also what unwritten pixels hold (0 without one).
    metadata: what else is told of the raster, as in its profile.
    mask: keep a mask of pixels with data, for rasters without a nodata value; "bands" keeps one a band.
    chunk: rows and columns that are compressed together. shard: rows and columns of one file, rounded up to
        whole chunks; by default up to 4 x 4 chunks within 64 MiB. (512, width) gives full-width rows.
    staging: where the store grows until it is published, in the same file system; by default in a hidden
        sibling. A known name lets `resume_zarr` go on after an interruption.
    overwrite: replace a store that `create_zarr` made, with nothing else in its folder.
    Raises RasterError where something stands at `path` already (without `overwrite`), where it is no such
    store, and where values don't fit.
    """
    import zarr

    target = followed(Path(path))
    # What grows elsewhere may end as a file of another kind.
    check_free(target, overwrite, not_a_store if staging is None or target.is_dir() else None)
    bands, height, width = shape
    if min(shape) < 1:
        raise RasterError(f"{target}: a raster can't have the shape {shape}")
    kind = np.dtype(dtype)
    if nodata is not None and not holds(kind, nodata):
        raise RasterError(f"{target}: nodata {nodata} is no {kind} value")
    names = band_names or tuple(f"band_{i + 1}" for i in range(bands))
    if len(names) != bands:
        raise RasterError(f"{target}: {len(names)} band names for {bands} bands: {', '.join(names)}")
    chunks, shards = layout(shape, kind, chunk, shard)
    profile = Profile(
        shape=shape,
        dtype=kind,
        crs=None if crs is None else CRS.from_user_input(crs),
        transform=transform or Affine.identity(),
        nodata=nodata,
        band_names=names,
        block_shape=(chunks[1], chunks[2]),
        colormap=colormap,
        tags=dict(tags or {}),
        metadata=metadata or Metadata(),
    )
    if staging and Path(staging).exists():
        raise RasterError(f"{staging}: exists already; resume_zarr goes on with it, or remove it")
    with writing(target):
        place = Path(staging) if staging else begin(target) / "store"
    writer = ZarrWriter(target, place, profile, (shards[1], shards[2]), overwrite)
    try:
        with writing(target):
            group = zarr.create_group(place, zarr_format=3, attributes=describe(profile))
            create_level(group, "0", profile, chunks, shards)
            if mask:
                create_mask(group, "0", shape if mask == "bands" else (height, width), chunks, shards)
    except BaseException:
        writer.discard()
        raise
    return writer


def resume_zarr(
    path: str | PathLike[str], staging: str | PathLike[str], *, overwrite: bool = False
) -> ZarrWriter:
    """The writer of a store that `create_zarr` began at `staging`; what is written stays."""
    source = ZarrSource(str(staging))
    import zarr

    with named(str(staging), "not a store of create_zarr"):
        shards = zarr.open_array(Path(staging) / "0", mode="r").shards
    if shards is None:
        raise RasterError(f"{staging}: not a store of create_zarr: its array has no shards")
    return ZarrWriter(Path(path), Path(staging), source.profile, (shards[1], shards[2]), overwrite)


def to_zarr(
    raster: Raster,
    path: str | PathLike[str],
    *,
    chunk: int = CHUNK,
    shard: Pair | None = None,
    pyramid: str | None = "auto",
    tags: dict[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Raster:
    """Copy a raster of any size to a sharded, multiscale zarr v3 store, shard by shard; returns it opened.

    pyramid: "average", "nearest" or "mode"; "auto" takes "mode" where there is a colour table, else
        "average"; None builds none. progress: called with (shards done, shards in all).
    overwrite: replace a store that stands at `path`, as `create_zarr` has it.

    Raises RasterError also where `path` is, holds or lies in anything that the raster is read from.
    """
    check_result(Path(path), raster, not_a_store, overwrite)
    about, value = raster.profile, common_value(raster)
    mask: bool | Literal["bands"] = value is None and raster.has_mask
    if mask and not raster.shares_mask:
        mask = "bands"
    writer = create_zarr(
        path,
        raster.shape,
        raster.dtype,
        crs=about.crs,
        transform=about.transform,
        nodata=value,
        band_names=about.band_names,
        colormap=about.colormap,
        tags={**about.tags, **(tags or {})},
        metadata=about.metadata,
        mask=mask,
        chunk=chunk,
        shard=shard or like_source(raster, chunk),
        overwrite=overwrite,
    )
    try:
        grid = writer.grid()
        with gdal_cache():
            for done, tile in enumerate(grid, 1):
                data, shown = _pixels(raster, tile.core, value)
                writer.write(data, tile.core, mask=shown)
                if progress is not None:
                    progress(done, len(grid))
        return writer.publish(pyramid=pyramid)
    except BaseException:
        writer.discard()
        raise


def _pixels(raster: Raster, window: Window, nodata: float | None) -> tuple[Array, NDArray[np.bool_] | None]:
    """Pixels with the nodata value where a band has none; where there is no such value, pixels and mask."""
    if not raster.has_mask:
        return raster.read(window), None
    pixels = raster.read(window, masked=True)
    if nodata is not None:
        return np.ma.filled(pixels, nodata), None
    valid = ~np.ma.getmaskarray(pixels)
    return np.ma.getdata(pixels), np.asarray(valid.any(axis=0)) if raster.shares_mask else valid


def _open_group(place: Path) -> zarr.Group:
    import zarr

    return zarr.open_group(place, mode="r+")
