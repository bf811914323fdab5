"""Sources of labelled face images, and the one line that names a source.

folder:PATH             PATH/<identity>/<image>: the ImageFolder layout, labels in name order
rec:PATH                an MXNet RecordIO file (`.rec` with `.idx`), or the folder of a `train.rec`
tar:PATTERN             WebDataset tar shards: a folder, a glob, or `name-{000..012}.tar`
synthetic:COUNT[xN]     COUNT identities, N images each (16), generated
...@24:40               only the identities 24 <= label < 40, renumbered from 0
"""

import re
from pathlib import Path

import numpy as np

from datasets.face_images import IMAGE_SUFFIXES, DamagedRecordError, FaceSource, decode_image
from datasets.identities import SyntheticIdentities
from datasets.recordio import RecordFaces
from datasets.shards import TarFaces


class FolderFaces:
    """Images of an ImageFolder tree: one folder an identity, labels in the order of the folders' names.

    Folders without an image carry no label. Raises ValueError when the path is no folder or holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder of identities")
        self._files: list[str] = []  # names only: a path object an image would be gigabytes in large sets
        self.names: list[str] = []
        labels: list[int] = []
        for folder in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            images = sorted(
                image.name for image in folder.iterdir() if image.suffix.lower() in IMAGE_SUFFIXES
            )
            if images:
                labels += [len(self.names)] * len(images)
                self._files += images
                self.names.append(folder.name)
        if not self._files:
            raise ValueError(f"{self.root} is empty: no image in any of its folders (one folder an identity)")
        self._labels = np.array(labels, np.int64)
        self.num_classes = len(self.names)

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions."""
        return self._labels

    def name(self, index: int) -> str:
        """Path of one position's image, relative to the root."""
        return f"{self.names[self._labels[index]]}/{self._files[index]}"

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        name = self.name(index)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise DamagedRecordError(name, f"cannot be read: {error.strerror}") from error
        return decode_image(data, name), int(self._labels[index])


class IdentityRange:
    """The identities start <= label < stop of another source, renumbered from 0.

    Raises ValueError where the source doesn't know its labels without reading all images, or has none in the
    range.
    """

    def __init__(self, source: FaceSource, start: int, stop: int) -> None:
        if not hasattr(source, "labels"):
            raise ValueError(f"{type(source).__name__} has no list of labels to select {start}:{stop} from")
        labels = source.labels()
        if not 0 <= start < stop <= source.num_classes:
            raise ValueError(f"identities {start}:{stop} of a source with {source.num_classes}")
        self.source, self.start, self.num_classes = source, start, stop - start
        self._positions = np.flatnonzero((labels >= start) & (labels < stop))
        self._labels: np.ndarray = labels[self._positions] - start
        self.names = (
            source.names[start:stop] if hasattr(source, "names") else [str(i) for i in range(start, stop)]
        )

    def __len__(self) -> int:
        return len(self._positions)

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions."""
        return self._labels

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        image, label = self.source.read(int(self._positions[index]))
        return image, label - self.start


def open_faces(spec: str, *, size: int = 112) -> FaceSource:
    """Open the source that a line such as `folder:faces@0:24` names; `size` is the synthetic images' own.

    Raises ValueError for an unknown kind, naming the known ones, and whatever the source itself finds wrong.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or kind not in ("folder", "rec", "tar", "synthetic"):
        raise ValueError(
            f"{spec!r} names no source of faces: folder:PATH, rec:PATH, tar:PATTERN or synthetic:COUNT"
        )
    selected = re.fullmatch(r"(.+)@(\d+):(\d+)", rest)
    place = selected[1] if selected else rest
    source: FaceSource
    if kind == "folder":
        source = FolderFaces(place)
    elif kind == "rec":
        source = RecordFaces(place)
    elif kind == "tar":
        source = TarFaces(place)
    else:
        source = _synthetic(place, size)
    return IdentityRange(source, int(selected[2]), int(selected[3])) if selected else source


def _synthetic(text: str, size: int) -> SyntheticIdentities:
    match = re.fullmatch(r"([\d_]+)(?:x(\d+))?", text)
    if not match:
        raise ValueError(f"synthetic:{text} is not synthetic:COUNT or synthetic:COUNTxIMAGES")
    return SyntheticIdentities(int(match[1]), int(match[2] or 16), size)
