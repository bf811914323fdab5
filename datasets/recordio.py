"""MXNet RecordIO files (`.rec`, `.idx`), read without that framework.

A file is a sequence of records aligned to four bytes. A record is one part, or several where the payload held
the magic word itself at an aligned place: the writer cuts there and drops the word, the reader puts it back.

    part     magic u32 = 0xced7230a | lrecord u32 = flag << 29 | length | payload, padded to 4 bytes
    flag     0 whole record, 1 first part, 2 middle part, 3 last part
    payload  of an image record: flag u32 | label f32 | id u64 | id2 u64 | flag x f32 labels | encoded image

All little-endian. The `.idx` file is text: one `key<TAB>byte offset` a line. (Facts of the format: dmlc-core
`recordio` and the Python reader of MXNet.)
"""

import os
import struct
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

import numpy as np

from datasets.face_images import DamagedRecordError
from tiling.publish import complete

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART = struct.Struct("<II")
IMAGE_HEADER = struct.Struct("<IfQQ")
MAX_PART = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)


@dataclass(frozen=True)
class ImageRecord:
    """The header of an image record and the encoded image behind it."""

    labels: tuple[float, ...]  # one number, or the array of a record with flag > 0
    id: int
    data: bytes


def pack_image_record(record: ImageRecord) -> bytes:
    """Serialise an image record: a single label sits in the header, several behind it."""
    if len(record.labels) == 1:
        return IMAGE_HEADER.pack(0, record.labels[0], record.id, 0) + record.data
    labels = np.asarray(record.labels, "<f4").tobytes()
    return IMAGE_HEADER.pack(len(record.labels), 0.0, record.id, 0) + labels + record.data


def unpack_image_record(payload: bytes, name: str) -> ImageRecord:
    """Parse the payload of an image record; raises `DamagedRecordError` when it is too short for its own
    header.
    """
    if len(payload) < IMAGE_HEADER.size:
        raise DamagedRecordError(
            name, f"{len(payload)} bytes are too few for an image header of {IMAGE_HEADER.size}"
        )
    flag, label, identifier, _ = IMAGE_HEADER.unpack_from(payload)
    if flag == 0:
        return ImageRecord((label,), identifier, payload[IMAGE_HEADER.size :])
    start = IMAGE_HEADER.size + 4 * flag
    if len(payload) < start:
        raise DamagedRecordError(name, f"{flag} labels announced, {len(payload)} bytes in the record")
    labels = np.frombuffer(payload, "<f4", flag, IMAGE_HEADER.size)
    return ImageRecord(tuple(float(value) for value in labels), identifier, payload[start:])


class RecordWriter:
    """Writes a `.rec` file and its `.idx`; a context manager. Both appear under their names when it closes
    well.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            # Closed in reverse: the index appears first, and a `.rec` is never without it.
            places = [
                opened.enter_context(complete(path)) for path in (self.path, self.path.with_suffix(".idx"))
            ]
            self._records: BinaryIO = opened.enter_context(places[0].open("wb"))
            self._index: TextIO = opened.enter_context(places[1].open("w"))
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, key: int, payload: bytes) -> None:
        """Append one record under a key."""
        if len(payload) > MAX_PART:
            raise ValueError(f"record {key} has {len(payload)} bytes; RecordIO holds at most {MAX_PART}")
        self._index.write(f"{key}\t{self._records.tell()}\n")
        cuts = _aligned_magic(payload)
        starts = [0, *(place + 4 for place in cuts)]
        for number, (start, end) in enumerate(zip(starts, [*cuts, len(payload)], strict=True)):
            last = number == len(cuts)
            flag = (LAST if number else WHOLE) if last else (MIDDLE if number else FIRST)
            part = payload[start:end]
            self._records.write(PART.pack(MAGIC, flag << 29 | len(part)) + part + bytes(-len(part) % 4))


def _aligned_magic(payload: bytes) -> list[int]:
    """Offsets, multiples of four, at which the payload holds the magic word."""
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    return [int(place) * 4 for place in np.flatnonzero(words == MAGIC)]


class RecordReader:
    """Reads records of a `.rec` file by their byte offsets."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.size = self.path.stat().st_size
        self._handle: tuple[int, BinaryIO] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handle": None}  # a descriptor means nothing in another process

    def name(self, key: int) -> str:
        """Name a record for a report."""
        return f"{self.path.name} record {key}"

    def read_at(self, offset: int, name: str) -> bytes:
        """Payload of the record at a byte offset; raises `DamagedRecordError` for a broken one."""
        parts: list[bytes] = []
        flag = MIDDLE
        while flag in (FIRST, MIDDLE):
            flag, length = self._part(offset, name, first=not parts)
            parts.append(self._pread(offset + PART.size, length))
            offset += PART.size + length + -length % 4
        return MAGIC_BYTES.join(parts)

    def start_of(self, offset: int, name: str, count: int) -> bytes:
        """The first bytes, `count` at most, of the payload at a byte offset: nothing more is read of it."""
        flag, length = self._part(offset, name, first=True)
        if length < count and flag != WHOLE:
            return self.read_at(offset, name)[:count]
        return self._pread(offset + PART.size, min(count, length))

    def after(self, offset: int, name: str) -> int:
        """The offset behind the record at one, found by its parts' headers alone."""
        flag, first = MIDDLE, True
        while flag in (FIRST, MIDDLE):
            flag, length = self._part(offset, name, first=first)
            offset, first = offset + PART.size + length + -length % 4, False
        return offset

    def next_magic(self, place: int, window: int = 1 << 22) -> int:
        """The next offset, `place` at least, where the magic word stands; the file's end where none does."""
        while place < self.size:
            found = _aligned_magic(self._pread(place, window))
            if found:
                return place + found[0]
            place += window
        return self.size

    def _part(self, offset: int, name: str, *, first: bool) -> tuple[int, int]:
        """Flag and length of the part at a byte offset; `DamagedRecordError` where there is none."""
        head = self._pread(offset, PART.size)
        if len(head) < PART.size:
            raise DamagedRecordError(
                name, f"the file ends at {self.size}, inside the header at byte {offset}"
            )
        magic, lrecord = PART.unpack(head)
        flag, length = lrecord >> 29, lrecord & MAX_PART
        if magic != MAGIC:
            raise DamagedRecordError(name, f"no record starts at byte {offset} (found 0x{magic:08x})")
        if flag not in ((WHOLE, FIRST) if first else (MIDDLE, LAST)):
            raise DamagedRecordError(name, f"part flag {flag} is out of sequence at byte {offset}")
        there = self.size - offset - PART.size
        if length > there:
            raise DamagedRecordError(name, f"{length} bytes announced at byte {offset}, {there} in the file")
        return flag, length

    def _pread(self, offset: int, count: int) -> bytes:
        if offset < 0:
            return b""  # a damaged index; nothing is there
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.path.open("rb", buffering=0))
        return os.pread(self._handle[1].fileno(), count, offset)


class RecordFile(RecordReader):
    """Random access to the records of a `.rec` file by key.

    With an index the keys are its own. Without one the headers are walked once and keys count the records;
    the walk steps over damage to the next magic word and remembers where it was in `gaps`.

    Raises ValueError when the index is malformed, or the file ends before its last record does (truncated).
    """

    def __init__(self, path: str | Path, index: str | Path | None = None) -> None:
        super().__init__(path)
        self.gaps: list[int] = []
        index = self.path.with_suffix(".idx") if index is None else Path(index)
        if index.is_file():
            self.keys, self.offsets = _read_index(index)
            self._check_length(index)
        else:
            self.offsets = self._scan()
            self.keys = np.arange(len(self.offsets))
        order = np.argsort(self.keys, kind="stable")
        self._sorted_keys, self._sorted_offsets = self.keys[order], self.offsets[order]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, key: int) -> bytes:
        """Payload of a record; raises KeyError for an unknown key and `DamagedRecordError` for a broken
        record.
        """
        place = int(np.searchsorted(self._sorted_keys, key))
        if place == len(self._sorted_keys) or self._sorted_keys[place] != key:
            raise KeyError(f"{self.path} has no record {key}")
        return self.read_at(int(self._sorted_offsets[place]), self.name(key))

    def _check_length(self, index: Path) -> None:
        if not len(self.offsets):
            raise ValueError(f"{index} lists no record")
        last = int(self.offsets.max())
        try:
            if last >= self.size:
                raise DamagedRecordError(
                    "", f"record at byte {last} is beyond the end of the file at {self.size}"
                )
            self.after(last, "last record")
        except DamagedRecordError as error:
            if "ends at" in error.reason or "in the file" in error.reason or "beyond" in error.reason:
                raise ValueError(
                    f"{self.path} is truncated: {index.name} lists {len(self)} records, but {error.reason}"
                ) from error

    def _scan(self) -> np.ndarray:
        """Offsets of all records, found by walking the file; damage is stepped over and kept in `gaps`."""
        offsets = array("q")
        place = 0
        while place < self.size:
            try:
                after = self.after(place, f"record at byte {place}")
            except DamagedRecordError:
                self.gaps.append(place)
                place = self.next_magic(place + 4)
                continue
            offsets.append(place)
            place = after
        if not offsets:
            raise ValueError(
                f"{self.path} holds no record: no magic word 0x{MAGIC:08x} in its {self.size} bytes"
            )
        return np.array(offsets, np.int64)


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        if not path.stat().st_size:
            raise ValueError(f"{path} lists no record")
        values = np.loadtxt(path, np.int64, ndmin=2, comments=None)
    except ValueError as error:
        if "columns changed" in str(error):
            raise ValueError(f"{path} is cut short: {error}") from error
        raise ValueError(f"{path} is not a RecordIO index of `key<TAB>offset` lines: {error}") from error
    if values.shape[1] != 2:
        raise ValueError(f"{path} is not a RecordIO index: {values.shape[1]} numbers in a line, not 2")
    return values[:, 0].copy(), values[:, 1].copy()
