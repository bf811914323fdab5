"""Tar shards in the WebDataset layout, with random access.

A sample is the files that share a name up to the first dot: `000017.jpg` with `000017.cls` (the label as
text) or `000017.json` (with a `cls` or `label` entry), a number or a name. Shards are plain tar files, so one
pass over their headers gives the place of every image; after that any image is one read, and the same exact
shuffle serves as for any other source.
"""

import hashlib
import json
import os
import re
import tarfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datasets.face_images import IMAGE_SUFFIXES, DamagedRecordError, decode_image
from datasets.face_index import FaceIndex, NameList, face_index, left_out_text, name_at

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

    A label is a number or, where fewer than half of them are numbers, a text: identities are then numbered in
    the order of their texts, which are their `names`. Samples without a readable label are damaged records:
    read raises for them, with their name. Raises ValueError for a shard that is no tar file or ends early
    (truncated), and when no shard holds an image.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = expand_shards(pattern)
        names = hashlib.sha256("\0".join(path.name for path in self.paths).encode(errors="replace"))
        place = self.paths[0].with_suffix(f".{len(self.paths)}-{names.hexdigest()[:8]}.faces.index")
        self.index = face_index(place, self.paths, lambda: _list_shards(self.paths, pattern))
        self.num_classes = int(self.index["labels"].max()) + 1
        if not self.num_classes:
            raise ValueError(f"no image of {pattern} has a label (a .cls or .json file of the same name)")
        if "identities" in self.index.arrays:
            self.names = [name_at(self.index, "identities", label) for label in range(self.num_classes)]
        self._handles: OrderedDict[tuple[int, int], BinaryIO] = OrderedDict()  # by process and shard

    @property
    def left_out(self) -> dict[str, int]:
        """How many members of which suffix are neither an image nor a label."""
        return dict(self.index.texts["left_out"])

    def __len__(self) -> int:
        return len(self.index["labels"])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": OrderedDict()}  # a descriptor means nothing in another process

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions, -1 where a label is missing."""
        return self.index["labels"]

    def name(self, index: int) -> str:
        """`SHARD/MEMBER` of one position."""
        # The name stands in the header before the image: kept there, it costs no memory.
        shard, offset = int(self.index["shards"][index]), int(self.index["offsets"][index])
        entry = os.pread(self._opened(shard).fileno(), 100, offset - tarfile.BLOCKSIZE).split(b"\0")[0]
        return f"{self.paths[shard].name}/{entry.decode(errors='replace')}"

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        shard, offset, size, label = (
            int(self.index[name][index]) for name in ("shards", "offsets", "sizes", "labels")
        )
        if label < 0:
            raise DamagedRecordError(self.name(index), "no readable label beside it")
        return decode_image(os.pread(self._opened(shard).fileno(), size, offset), self.name(index)), label

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


def _list_shards(paths: list[Path], pattern: str) -> FaceIndex:
    """Where the images of all shards lie, and their labels; one pass over the headers."""
    places = {name: array("q") for name in ("shards", "offsets", "sizes")}
    texts: dict[bytes, int] = {}  # in the order met; an image's label is a place in them, -1 for none
    labels, left_out = array("q"), Counter[str]()
    for number, path in enumerate(paths):
        for image, text in _samples(path, left_out):
            places["shards"].append(number)
            places["offsets"].append(image.offset)
            places["sizes"].append(image.size)
            labels.append(-1 if text is None else texts.setdefault(text, len(texts)))
    if not labels:
        raise ValueError(f"no image in {len(paths)} tar shards of {pattern}{left_out_text(left_out)}")
    numbers, identities = _numbered(list(texts))
    arrays = {name: np.array(values, np.int64) for name, values in places.items()}
    # The last entry stands for -1: images without a label.
    arrays["labels"] = np.append(numbers, -1)[np.array(labels, np.int64)]
    return FaceIndex(arrays | identities, {"left_out": dict(left_out)})


def _numbered(texts: list[bytes]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The labels int64 of the distinct texts and, where texts are names, the identities' names as arrays."""
    numbers = [_number(text) for text in texts]
    if 2 * sum(number >= 0 for number in numbers) >= len(texts):
        return np.array(numbers, np.int64), {}
    order = sorted(range(len(texts)), key=texts.__getitem__)
    names = NameList()
    for place in order:
        names.append(os.fsdecode(texts[place]))
    labels = np.empty(len(texts), np.int64)
    labels[order] = np.arange(len(texts))
    return labels, names.arrays("identities")


def _number(text: bytes) -> int:
    try:
        number = int(text)
    except ValueError:
        return -1
    return number if 0 <= number < 1 << 62 else -1


def _samples(path: Path, left_out: Counter[str]) -> Iterator[tuple[_Member, bytes | None]]:
    """Image members of a shard and their labels' texts (None: no label), in the shard's order."""
    images: dict[str, _Member] = {}
    labels: dict[str, bytes] = {}
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as shard:
            while (entry := shard.next()) is not None:
                shard.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if not entry.isfile():
                    continue
                if entry.offset_data + entry.size > length:
                    raise tarfile.ReadError(
                        f"{entry.name} ends at byte {entry.offset_data + entry.size} of {length}"
                    )
                folder, _, file = entry.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}"
                if f".{extension.lower()}" in IMAGE_SUFFIXES and stem:
                    images[key] = _Member(entry.offset_data, entry.size)
                elif extension in ("cls", "json"):
                    handle = shard.extractfile(entry)
                    labels.setdefault(key, _label(handle.read() if handle else b"", extension))
                else:
                    left_out[f".{extension}" if stem and extension else "hidden or without a suffix"] += 1
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no tar file: {error}") from error
    for key, image in images.items():
        yield image, labels.get(key) or None


def _label(text: bytes, extension: str) -> bytes:
    """The label in a .cls or .json member as text, empty where there is none."""
    if extension == "cls":
        return text.strip()
    try:
        described = json.loads(text)
        label = described.get("cls", described.get("label", ""))
    except (ValueError, AttributeError):
        return b""
    whole = isinstance(label, int | str) and not isinstance(label, bool)
    return str(label).strip().encode(errors="surrogateescape") if whole else b""
