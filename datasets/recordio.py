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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

import numpy as np

from datasets.face_images import DamagedRecordError, decode_image

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
        self._index_path = self.path.with_suffix(".idx")
        self._partial = [part.with_name(part.name + ".partial") for part in (self.path, self._index_path)]

    def __enter__(self) -> Self:
        self._records: BinaryIO = self._partial[0].open("wb")
        self._index: TextIO = self._partial[1].open("w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._records, self._index):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for partial, final in zip(self._partial, (self.path, self._index_path), strict=True):
            if kind is None:
                partial.replace(final)
            else:
                partial.unlink()

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


class RecordFile:
    """Random access to the records of a `.rec` file by key.

    With an index the keys are its own. Without one the file is scanned once and keys count the records; the
    scan steps over damage to the next magic word and remembers where it was in `gaps`.

    Raises ValueError when the index is malformed, or the file ends before its last record does (truncated).
    """

    def __init__(self, path: str | Path, index: str | Path | None = None) -> None:
        self.path = Path(path)
        self.size = self.path.stat().st_size
        self.gaps: list[int] = []
        self._handle: tuple[int, BinaryIO] | None = None
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

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handle": None}  # a descriptor means nothing in another process

    def read(self, key: int) -> bytes:
        """Payload of a record; raises KeyError for an unknown key and `DamagedRecordError` for a broken
        record.
        """
        place = int(np.searchsorted(self._sorted_keys, key))
        if place == len(self._sorted_keys) or self._sorted_keys[place] != key:
            raise KeyError(f"{self.path} has no record {key}")
        return self._read_at(int(self._sorted_offsets[place]), self.name(key))[0]

    def name(self, key: int) -> str:
        """Name a record for a report."""
        return f"{self.path.name} record {key}"

    def _read_at(self, offset: int, name: str) -> tuple[bytes, int]:
        """Payload of the record at a byte offset, and the offset behind it."""
        parts: list[bytes] = []
        while True:
            head = self._pread(offset, PART.size)
            if len(head) < PART.size:
                raise DamagedRecordError(
                    name, f"the file ends at {self.size}, inside the header at byte {offset}"
                )
            magic, lrecord = PART.unpack(head)
            flag, length = lrecord >> 29, lrecord & MAX_PART
            if magic != MAGIC:
                raise DamagedRecordError(name, f"no record starts at byte {offset} (found 0x{magic:08x})")
            if flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise DamagedRecordError(name, f"part flag {flag} is out of sequence at byte {offset}")
            part = self._pread(offset + PART.size, length)
            if len(part) < length:
                raise DamagedRecordError(
                    name, f"{length} bytes announced at byte {offset}, {len(part)} in the file"
                )
            parts.append(part)
            offset += PART.size + length + -length % 4
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts), offset

    def _pread(self, offset: int, count: int) -> bytes:
        if offset < 0:
            return b""  # a damaged index; nothing is there
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.path.open("rb", buffering=0))
        return os.pread(self._handle[1].fileno(), count, offset)

    def _check_length(self, index: Path) -> None:
        if not len(self.offsets):
            raise ValueError(f"{index} lists no record")
        last = int(self.offsets.max())
        try:
            if last >= self.size:
                raise DamagedRecordError(
                    "", f"record at byte {last} is beyond the end of the file at {self.size}"
                )
            self._read_at(last, "last record")
        except DamagedRecordError as error:
            if "ends at" in error.reason or "in the file" in error.reason or "beyond" in error.reason:
                raise ValueError(
                    f"{self.path} is truncated: {index.name} lists {len(self)} records, but {error.reason}"
                ) from error

    def _scan(self) -> np.ndarray:
        """Offsets of all records, found by walking the file; damage is stepped over and kept in `gaps`."""
        offsets: list[int] = []
        place = 0
        while place < self.size:
            try:
                after = self._read_at(place, f"record at byte {place}")[1]
            except DamagedRecordError:
                self.gaps.append(place)
                place = self._next_magic(place + 4)
                continue
            offsets.append(place)
            place = after
        if not offsets:
            raise ValueError(
                f"{self.path} holds no record: no magic word 0x{MAGIC:08x} in its {self.size} bytes"
            )
        return np.asarray(offsets, np.int64)

    def _next_magic(self, place: int, window: int = 1 << 22) -> int:
        while place < self.size:
            found = _aligned_magic(self._pread(place, window))
            if found:
                return place + found[0]
            place += window
        return self.size


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    text = path.read_text()
    try:
        values = np.array(text.split(), np.int64)
    except ValueError as error:
        raise ValueError(f"{path} is not a RecordIO index of `key<TAB>offset` lines: {error}") from error
    if values.size % 2:
        raise ValueError(f"{path} is cut short: {values.size} numbers are not pairs of key and offset")
    return values[0::2].copy(), values[1::2].copy()


class RecordFaces:
    """Face images of a RecordIO file, with the layout of the public face training sets.

    Record 0, where it carries two labels, says that images have keys 1 ... first - 1 and that the records
    first ... last - 1 stand for the identities; else every record is an image. The label is the first of an
    image's. The number of identities comes from record 0, from the `property` file beside
    (`classes,height,width`), or from reading all headers. Labels are float32 in this format: exact up to 16.7
    million identities.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.records = RecordFile(path / "train.rec" if path.is_dir() else path)
        self._keys = self.records.keys
        self.num_classes = self._layout()

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        record = self._record(int(self._keys[index]))
        name = self.records.name(int(self._keys[index]))
        return decode_image(record.data, name), _identity(record, name)

    def _record(self, key: int) -> ImageRecord:
        return unpack_image_record(self.records.read(key), self.records.name(key))

    def _layout(self) -> int:
        """Set the image keys and return the number of identities."""
        counted = None
        if 0 in self._keys[:1]:
            try:
                first = self._record(0)
                if len(first.labels) > 1:
                    begin, end = (_whole(label, "record 0") for label in first.labels[:2])
                    self._keys = self._keys[(self._keys > 0) & (self._keys < begin)]
                    counted = end - begin
            except DamagedRecordError:
                pass  # a damaged first record says nothing: fall through to the other two ways
        described = self.records.path.with_name("property")
        if described.is_file():
            counted = int(described.read_text().split(",")[0])
        if not len(self._keys):
            raise ValueError(f"{self.records.path} holds no image record")
        return counted if counted else self._largest_label() + 1

    def _largest_label(self) -> int:
        largest = -1
        for key in self._keys:
            try:
                name = self.records.name(int(key))
                largest = max(largest, _identity(self._record(int(key)), name))
            except DamagedRecordError:
                continue
        if largest < 0:
            raise ValueError(f"{self.records.path}: none of its {len(self._keys)} records can be read")
        return largest


def _identity(record: ImageRecord, name: str) -> int:
    """The label of an image; a damaged record where it is no number from 0 on."""
    return _whole(record.labels[0], name)


def _whole(label: float, name: str) -> int:
    if not (label >= 0 and label.is_integer()):
        raise DamagedRecordError(name, f"the label {label} is no whole number from 0 on")
    return int(label)
