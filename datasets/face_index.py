"""One file beside a set that lists its images: written once, memory-mapped by every process of a machine.

Walking forty million directory entries or tar headers takes longer than many an epoch, and their names as
Python objects take gigabytes in each process. The file is in the safetensors format (arrays, and texts as its
metadata); it is made anew when what it was made from has changed. Sets of fewer than `WORTH_KEEPING` images
are listed anew by each process instead, and nothing is left beside them.

Legend: N images, I identities.
"""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file

from tiling.publish import discard, publish, staging_name

WORTH_KEEPING = 100_000  # images
STILL_MOVING = 2.0  # seconds: a folder changed so shortly before it was listed may have changed again since


@dataclass(frozen=True)
class FaceIndex:
    """Arrays and texts that list a set: `labels` int64 [N] (-1 where one can't be read) and a source's own.

    Attributes:
        arrays: by name.
        texts: by name, anything that JSON holds.
        path: the file they are mapped from, None where they are in memory.
    """

    arrays: Mapping[str, np.ndarray]
    texts: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file for itself."""
        if self.path is None:
            return FaceIndex, (dict(self.arrays), dict(self.texts))
        return mapped_index, (self.path,)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, shared by all processes where they are mapped."""
        return sum(array.nbytes for array in self.arrays.values())


class NameList:
    """Grows into two arrays of an index, `KIND` uint8 and `KIND_ends` int64: names of any bytes a file system
    can hold, without an object each."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, name: str) -> None:
        """Add one."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def arrays(self, kind: str) -> dict[str, np.ndarray]:
        """The two arrays; the list must not grow afterwards."""
        ends = np.frombuffer(self._ends, np.int64) if self._ends else np.empty(0, np.int64)
        return {kind: np.frombuffer(self._bytes, np.uint8), f"{kind}_ends": ends}


def name_at(index: FaceIndex, kind: str, position: int) -> str:
    """One name of a `NameList`."""
    ends = index[f"{kind}_ends"]
    start = int(ends[position - 1]) if position else 0
    return os.fsdecode(index[kind][start : int(ends[position])].tobytes())


def left_out_text(left_out: Mapping[str, int]) -> str:
    """``; left out: 3 .txt, 1 hidden``, or nothing."""
    counts = [f"{count:,} {kind}" for kind, count in sorted(left_out.items())]
    return f"; left out: {', '.join(counts)}" if counts else ""


def state_of(paths: list[Path]) -> tuple[str, float]:
    """A digest of names, sizes and times of files or folders, and the newest of the times (seconds)."""
    digest, newest = hashlib.sha256(), 0.0
    for path in paths:
        status = path.stat()
        digest.update(os.fsencode(path.name) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
        newest = max(newest, status.st_mtime_ns / 1e9)
    return digest.hexdigest(), newest


def face_index(place: Path, watched: list[Path], build: Callable[[], FaceIndex]) -> FaceIndex:
    """The index of a set: mapped from `place` where that is of the set as it is, else built, and kept there
    where it is worth it.

    Args:
        place: the file's path; where its folder can't be written to, one in the user's cache stands for it.
        watched: files and folders whose size or time changes when the set does.
        build: lists the set.

    Processes that open one set at the same time build it once.
    """
    places = [place, _cached(place)]
    state, newest = state_of(watched)
    if (kept := _fresh(places, state, newest)) is not None:
        return kept
    target = places[0] if os.access(place.parent, os.W_OK) else places[1]
    with _one_at_a_time(target):
        if (kept := _fresh(places, state, newest)) is not None:
            return kept
        begun = time.time()
        built = build()
        if len(built["labels"]) < WORTH_KEEPING:
            return built
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, built, state, begun)
    return mapped_index(target)


def mapped_index(path: Path) -> FaceIndex:
    """Open an index file; ValueError where it is none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no index of images")
        header: dict[str, Any] = json.loads(file.read(length))
    texts = json.loads(header.pop("__metadata__")["texts"])
    arrays = {name: _mapped(path, 8 + length, size, entry) for name, entry in header.items()}
    return FaceIndex(arrays, texts, path)


def _mapped(path: Path, data: int, size: int, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if data + stop > size:
        raise ValueError(f"{path} is cut short")
    if start == stop:
        return np.empty(entry["shape"], DTYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    return np.memmap(path, DTYPES[entry["dtype"]], "r", data + start, shape)


DTYPES = {"I64": np.int64, "U8": np.uint8}


def _fresh(places: list[Path], state: str, newest: float) -> FaceIndex | None:
    for place in places:
        try:
            index = mapped_index(place)
            if index.texts["state"] == state and newest < index.texts["begun"] - STILL_MOVING:
                return index
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or damaged: it is made anew
    return None


def _write(path: Path, index: FaceIndex, state: str, begun: float) -> None:
    staging = staging_name(path)
    texts = dict(index.texts) | {"state": state, "begun": begun}
    try:
        save_file(dict(index.arrays), staging, {"texts": json.dumps(texts)})
        publish(staging, path)
    finally:
        discard(staging)


def _cached(place: Path) -> Path:
    """Where the index of a set on a read-only disk is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]
    return home / "bigvision" / "faces" / f"{digest}{place.suffix}"


@contextmanager
def _one_at_a_time(target: Path) -> Any:
    """Holds a lock beside the file; on file systems without locks each process builds for itself."""
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
