"""Shards of a store on the disk: flushed before they count as there, looked at before they are believed."""

import zlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from rasterio.windows import Window

from tiling.publish import flush
from tiling.zarr_store import ZarrWriter

# Bytes and CRC-32 of a shard's file; None where there is none because all of it is nodata.
Stamp = tuple[int, int] | None
_AT_ONCE = 2**20


def settle(writer: ZarrWriter, window: Window) -> dict[str, Stamp]:
    """Flush the shards of a window of an unfinished store to the disk; their stamps, by names within it."""
    names = list(_names(writer, window))
    folders = set()
    for name in names:
        file = writer.staging / name
        if file.exists():
            flush(file)
            folders |= {file.parent, file.parent.parent}
    for folder in folders:
        flush(folder)
    return {name: stamp(writer.staging / name) for name in names}


def stamp(file: Path) -> Stamp:
    """Of a shard as it is now."""
    size = crc = 0
    try:
        with file.open("rb") as stream:
            while part := stream.read(_AT_ONCE):
                size, crc = size + len(part), zlib.crc32(part, crc)
    except FileNotFoundError:
        return None
    return size, crc


def lost(store: Path, stamps: Mapping[str, Stamp]) -> list[str]:
    """Names of the shards that aren't what they were when they were stamped."""
    return [name for name, known in stamps.items() if stamp(store / name) != known]


def forget(store: Path, known: Set[str]) -> None:
    """Remove the shards but those `known`: whether a killed writer finished them nobody can say."""
    for array in ("0/c", "mask/0/c"):
        for file in list((store / array).rglob("*")):
            if file.is_file() and file.relative_to(store).as_posix() not in known:
                file.unlink()


def _names(writer: ZarrWriter, window: Window) -> Iterator[str]:
    tall, wide = writer.shard
    arrays = ["0/c/0", *(["mask/0/c"] if (writer.staging / "mask" / "0").is_dir() else [])]
    for row in range(window.row_off // tall, -(-(window.row_off + window.height) // tall)):
        for column in range(window.col_off // wide, -(-(window.col_off + window.width) // wide)):
            yield from (f"{array}/{row}/{column}" for array in arrays)
