"""The directories of a TIFF on this machine: whether all that they name lies within the file.

GDAL reads a file that was cut off as far as it can: a mask, a nodata value or a scale whose directory is gone
is then silently none. (TIFF 6.0, section 2; BigTIFF has 8 bytes where TIFF has 2 or 4.)
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tiling.errors import RasterError

# Bytes of a value by its type's number.
_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_OFFSETS, _COUNTS = (273, 324), (279, 325)  # of strips and of tiles
_MOST_DIRECTORIES = 65536


def check_directories(path: str) -> None:
    """RasterError where a directory, a value of one, or a block of pixels ends beyond the file."""
    length = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(16)
        if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return
        order, big = "<" if start[:2] == b"II" else ">", start[2:4] in (b"+\0", b"\0+")
        reader = _Reader(path, file, length, order, big)
        (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", start, 8 if big else 4)
        seen: set[int] = set()
        while place and place not in seen and len(seen) < _MOST_DIRECTORIES:
            seen.add(place)
            place = reader.directory(place)


class _Reader:
    def __init__(self, path: str, file: BinaryIO, length: int, order: str, big: bool) -> None:
        self.path, self.file, self.length, self.order, self.big = path, file, length, order, big

    def directory(self, place: int) -> int:
        """Where the next directory is, 0 after the last."""
        count_kind, entry_kind, word = ("Q", "HHQ8s", "Q") if self.big else ("H", "HHI4s", "I")
        (count,) = self._unpack(count_kind, place, "a directory")
        at = place + struct.calcsize(f"{self.order}{count_kind}")
        size = struct.calcsize(f"{self.order}{entry_kind}")
        self._within(at + count * size, "a directory")
        self.file.seek(at)
        entries = self.file.read(count * size)
        blocks: dict[int, np.ndarray] = {}
        for number in range(count):
            tag, kind, values, inline = struct.unpack_from(
                f"{self.order}{entry_kind}", entries, number * size
            )
            bytes_ = _BYTES.get(kind, 0) * values
            if bytes_ <= len(inline):
                content: bytes | int = inline[:bytes_]
            else:
                (content,) = struct.unpack(f"{self.order}{word}", inline)
                self._within(content + bytes_, f"the value of tag {tag}")
            if tag in _OFFSETS + _COUNTS and kind in (3, 4, 16):
                blocks[tag] = self._numbers(content, kind, bytes_)
        for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
            if offsets in blocks and counts in blocks and len(blocks[offsets]) == len(blocks[counts]):
                ends = blocks[offsets] + blocks[counts]
                if ends.size and ends.max() > self.length:
                    self._within(int(ends.max()), f"block {int(ends.argmax())}")
        (following,) = self._unpack(word, at + count * size, "a directory")
        return int(following)

    def _numbers(self, content: bytes | int, kind: int, size: int) -> np.ndarray:
        if isinstance(content, int):
            self.file.seek(content)
            content = self.file.read(size)
        return np.frombuffer(content, f"{self.order}u{_BYTES[kind]}").astype(np.uint64)

    def _unpack(self, kind: str, place: int, what: str) -> tuple[int, ...]:
        size = struct.calcsize(f"{self.order}{kind}")
        self._within(place + size, what)
        self.file.seek(place)
        return struct.unpack(f"{self.order}{kind}", self.file.read(size))

    def _within(self, end: int, what: str) -> None:
        if end > self.length:
            raise RasterError(f"{self.path}: truncated: {what} ends at byte {end}, the file at {self.length}")
