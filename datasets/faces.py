"""Sources of labelled face images, and the one line that names a source.

folder:PATH             PATH/<identity>/<image>: the ImageFolder layout, labels in name order
rec:PATH                an MXNet RecordIO file (`.rec` with `.idx`), or the folder of a `train.rec`
tar:PATTERN             WebDataset tar shards: a folder, a glob, or `name-{000..012}.tar`
synthetic:COUNT[xN]     COUNT identities, N images each (16), generated
...@dense               labels (of any numbers) numbered from 0 on in their order, without gaps
...@24:40               only the identities 24 <= label < 40, renumbered from 0
"""

import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.face_images import DamagedRecordError, FaceSource, decode_image, is_image_file, kind_of_file
from datasets.face_index import FaceIndex, NameList, face_index, left_out_text, name_at
from datasets.identities import SyntheticIdentities
from datasets.record_faces import RecordFaces
from datasets.shards import TarFaces

INDEX = ".faces.index"


class FolderFaces:
    """Images of an ImageFolder tree: one folder an identity, labels in the order of the folders' names.

    Folders without an image carry no label, hidden ones are none. `left_out` counts what else stands there,
    by suffix or kind. Raises ValueError when the path is no folder or holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder of identities")
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir() and not _hidden(entry))
        # The tree itself is left out of what is watched: the index lies in it. Its folders' names are in.
        self.index = face_index(self.root / INDEX, folders, lambda: _list_tree(self.root, folders))
        if not len(self):
            raise ValueError(
                f"{self.root} is empty: no image in any of its folders (one folder an identity)"
                f"{left_out_text(self.left_out)}"
            )
        self.num_classes = len(self.index["identities_ends"])

    @property
    def names(self) -> list[str]:
        """The identities' names, in label order."""
        return [name_at(self.index, "identities", label) for label in range(self.num_classes)]

    @property
    def left_out(self) -> dict[str, int]:
        """How many files of which kind are no images of an identity."""
        return dict(self.index.texts["left_out"])

    def __len__(self) -> int:
        return len(self.index["labels"])

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions."""
        return self.index["labels"]

    def name(self, index: int) -> str:
        """Path of one position's image, relative to the root."""
        folder = name_at(self.index, "identities", int(self.index["labels"][index]))
        return f"{folder}/{name_at(self.index, 'files', index)}"

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        name = self.name(index)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise DamagedRecordError(name, f"cannot be read: {error.strerror}") from error
        return decode_image(data, name), int(self.index["labels"][index])


def _hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def _list_tree(root: Path, folders: list[Path]) -> FaceIndex:
    files, identities, labels, left_out = NameList(), NameList(), array("q"), Counter[str]()
    for entry in root.iterdir():
        if _hidden(entry):
            left_out["hidden"] += not entry.name.startswith(INDEX)
        elif not entry.is_dir():
            left_out["beside the identities' folders"] += 1
    for folder in folders:
        images = []
        for entry in folder.iterdir():
            if is_image_file(entry) and entry.is_file():
                images.append(entry.name)
            else:
                left_out[kind_of_file(entry)] += 1
        for name in sorted(images):
            files.append(name)
            labels.append(len(identities))
        if images:
            identities.append(folder.name)
    arrays = {
        "labels": np.array(labels, np.int64),
        **files.arrays("files"),
        **identities.arrays("identities"),
    }
    return FaceIndex(arrays, {"left_out": dict(+left_out)})


class _Relabelled:
    """Some identities of another source, under other labels."""

    def __init__(self, source: FaceSource, positions: np.ndarray | None, identities: np.ndarray) -> None:
        self.source, self.num_classes = source, len(identities)
        self._positions, self._identities = positions, identities  # positions None: all

    @property
    def names(self) -> list[str]:
        """The identities' names, or their numbers in the other source."""
        known = getattr(self.source, "names", None)
        return [known[label] if known else str(label) for label in self._identities.tolist()]

    def __len__(self) -> int:
        return len(self.source) if self._positions is None else len(self._positions)

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions, -1 where one can't be read."""
        labels = self.source.labels()
        labels = labels if self._positions is None else labels[self._positions]
        return np.where(labels < 0, -1, np.searchsorted(self._identities, labels))

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        image, label = self.source.read(index if self._positions is None else int(self._positions[index]))
        return image, int(np.searchsorted(self._identities, label))


class IdentityRange(_Relabelled):
    """The identities start <= label < stop of another source, renumbered from 0.

    Raises ValueError where the source has none in the range.
    """

    def __init__(self, source: FaceSource, start: int, stop: int) -> None:
        if not 0 <= start < stop <= source.num_classes:
            raise ValueError(f"identities {start}:{stop} of a source with {source.num_classes}")
        labels = source.labels()
        super().__init__(source, np.flatnonzero((labels >= start) & (labels < stop)), np.arange(start, stop))


class DenseIdentities(_Relabelled):
    """All images of another source, its labels numbered from 0 on in their order, without gaps."""

    def __init__(self, source: FaceSource) -> None:
        labels = source.labels()
        super().__init__(source, None, np.unique(labels[labels >= 0]))


def listing_bytes(source: FaceSource) -> tuple[int, int]:
    """Bytes of a source's list of images: mapped or held once for a machine, and held by each process."""
    if isinstance(source, _Relabelled):
        shared, each = listing_bytes(source.source)
        own = [array.nbytes for array in (source._positions, source._identities) if array is not None]
        return shared, each + sum(own)
    index = getattr(source, "index", None)
    if index is None:
        return 0, 0
    return (index.nbytes, 0) if index.path is not None else (0, index.nbytes)


def check_labels(source: FaceSource, spec: str) -> str:
    """What there is to say of a source's labels, "" where they are 0, 1, ... without a gap.

    Raises ValueError, naming an image, where labels are not below the number of identities that the source
    itself states, or where more than half of the numbers below the largest label are nobody's.
    """
    labels = source.labels()
    largest = int(labels.max(initial=-1))
    place = int(labels.argmax()) if len(labels) else 0
    what = f"{spec}: {_name(source, place)} has label {largest}"
    dense = f"{spec}@dense numbers them from 0"
    if largest >= source.num_classes:
        raise ValueError(f"{what}, but the set counts {source.num_classes} identities; {dense}")
    used = len(np.unique(labels[labels >= 0]))
    if 2 * used < source.num_classes:
        raise ValueError(f"{what}, but only {used} of {source.num_classes} identities have an image; {dense}")
    missing = source.num_classes - used
    return f"{missing} of {source.num_classes} identities have no image" if missing else ""


def _name(source: FaceSource, position: int) -> str:
    name = getattr(source, "name", None)
    return f"image {position}" if name is None else str(name(position))


def open_faces(spec: str, *, size: int = 112) -> FaceSource:
    """Open the source that a line such as `folder:faces@0:24` names; `size` is the synthetic images' own.

    Raises ValueError for an unknown kind, naming the known ones, and whatever the source itself finds wrong.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or kind not in ("folder", "rec", "tar", "synthetic"):
        meant = f"; did you mean folder:{spec}?" if not separator and Path(spec).is_dir() else ""
        raise ValueError(
            f"{spec!r} names no source of faces: folder:PATH, rec:PATH, tar:PATTERN or synthetic:COUNT{meant}"
        )
    place, dense, chosen = _selection(rest)
    source = _open(kind, place, size)
    source = DenseIdentities(source) if dense else source
    return source if chosen is None else IdentityRange(source, *chosen)


def _open(kind: str, place: str, size: int) -> FaceSource:
    if kind == "synthetic":
        return _synthetic(place, size)
    if kind == "folder":
        return FolderFaces(place)
    return RecordFaces(place) if kind == "rec" else TarFaces(place)


def _selection(text: str) -> tuple[str, bool, tuple[int, int] | None]:
    """`PLACE@dense@24:40`: the place, whether labels are numbered densely, the identities chosen of them."""
    match = re.fullmatch(r"(.+?)(@dense)?(?:@(\d+):(\d+))?", text)
    if not match:
        return text, False, None
    return match[1], match[2] is not None, (int(match[3]), int(match[4])) if match[3] else None


def _synthetic(text: str, size: int) -> SyntheticIdentities:
    match = re.fullmatch(r"([\d_]+)(?:x(\d+))?", text)
    if not match:
        raise ValueError(f"synthetic:{text} is not synthetic:COUNT or synthetic:COUNTxIMAGES")
    return SyntheticIdentities(int(match[1]), int(match[2] or 16), size)
