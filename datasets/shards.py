"""Tar shards in the WebDataset layout, with random access.

A sample is the files that share a name up to the first dot: `000017.jpg` with `000017.cls` (the label as
text) or `000017.json` (with a `cls` or `label` entry). Shards are plain tar files, so one pass over their
headers gives the place of every image; after that any image is one read, and the same exact shuffle serves as
for any other source.
"""

import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datasets.face_images import IMAGE_SUFFIXES, DamagedRecordError, decode_image

MOST_OPEN = 128  # shards; processes commonly get 1024 files


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


def expand_shards(pattern: str) -> list[Path]:
    """Paths of a pattern: a folder of `.tar` files, a glob, and `{000..012}` ranges; raises ValueError for
    none.
    """
    paths: list[Path] = []
    for name in _expand_ranges(pattern):
        path = Path(name)
        if path.is_dir():
            paths += sorted(path.glob("*.tar"))
        elif any(letter in name for letter in "*?["):
            paths += sorted(path.parent.glob(path.name))
        else:
            paths.append(path)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"no tar shard at {', '.join(missing) or pattern}")
    return paths


def _expand_ranges(pattern: str) -> list[str]:
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    choices: list[list[str]] = [[pieces[0]]]
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        choices += [[f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)], [text]]
    return ["".join(choice) for choice in product(*choices)]


class TarFaces:
    """Face images of WebDataset tar shards.

    Samples without a readable label are damaged records: read raises for them, with their name. Raises
    ValueError for a shard that is no tar file or ends early (truncated), and when no shard holds an image.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = expand_shards(pattern)
        places: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(self.paths):
            for image, label in _samples(path):
                places.append((number, image.offset, image.size, label))
        if not places:
            raise ValueError(f"no image in {len(self.paths)} tar shards of {pattern}")
        self._places = np.array(places, np.int64)
        self.num_classes = int(self._places[:, 3].max()) + 1
        if not self.num_classes:
            raise ValueError(f"no image of {pattern} has a label (a .cls or .json file of the same name)")
        self._handles: OrderedDict[tuple[int, int], BinaryIO] = OrderedDict()  # by process and shard

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": OrderedDict()}  # a descriptor means nothing in another process

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions, -1 where a label is missing."""
        return self._places[:, 3]

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        shard, offset, size, label = (int(value) for value in self._places[index])
        handle = self._opened(shard)
        # The name stands in the header before the image: kept there, it costs no memory.
        entry = os.pread(handle.fileno(), 100, offset - tarfile.BLOCKSIZE).split(b"\0")[0]
        name = f"{self.paths[shard].name}/{entry.decode(errors='replace')}"
        if label < 0:
            raise DamagedRecordError(name, "no readable label beside it")
        return decode_image(os.pread(handle.fileno(), size, offset), name), label

    def _opened(self, shard: int) -> BinaryIO:
        """A shard's file; the one not read for longest is closed, as sets have more shards than a process may
        have files."""
        place = (os.getpid(), shard)
        handle = self._handles.get(place)
        if handle is None:
            handle = self._handles[place] = self.paths[shard].open("rb", buffering=0)
        self._handles.move_to_end(place)
        if len(self._handles) > MOST_OPEN:
            self._handles.popitem(last=False)[1].close()
        return handle


def _samples(path: Path) -> Iterator[tuple[_Member, int]]:
    """Image members of a shard and their labels (-1: none), in the shard's order."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as shard:
            for entry in shard:
                if not entry.isfile():
                    continue
                if entry.offset_data + entry.size > length:
                    raise tarfile.ReadError(
                        f"{entry.name} ends at byte {entry.offset_data + entry.size} of {length}"
                    )
                folder, _, file = entry.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}"
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    images[key] = _Member(entry.offset_data, entry.size)
                elif extension in ("cls", "json"):
                    handle = shard.extractfile(entry)
                    labels.setdefault(key, _label(handle.read() if handle else b"", extension))
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is truncated or no tar file: {error}") from error
    for key, image in images.items():
        yield image, labels.get(key, -1)


def _label(text: bytes, extension: str) -> int:
    try:
        if extension == "cls":
            return int(text)
        described = json.loads(text)
        return int(described.get("cls", described.get("label", -1)))
    except (ValueError, TypeError, AttributeError):
        return -1
