"""A gallery of known faces, and who is in a picture.

A gallery is a folder: `embeddings.npy` [G, D] float32 of unit length and `labels.npy` [G] int64 (both
memory-mapped when searched), `gallery.json` with the identities' names and the weights' fingerprint. It
appears when it is complete.

Legend: G gallery rows, D dimension, k neighbours.
"""

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigvision.jobs.evaluate_faces import EmbedOptions, load_embedder
from bigvision.jobs.faces.embed import Embedder
from bigvision.jobs.faces.search import identity_templates, nearest
from datasets.alignment import align_face, read_landmarks
from datasets.face_images import (
    DamagedRecordError,
    FaceSource,
    decode_image,
    fit_square,
    is_image_file,
    kind_of_file,
    printable,
)
from datasets.face_index import left_out_text
from datasets.faces import FolderFaces, open_faces
from tiling.publish import complete

# A detector takes an image uint8 [H, W, 3] and returns the five landmarks float [F, 5, 2] of the faces in it.
Detector = Callable[[np.ndarray], np.ndarray]
FACES_AT_ONCE = 256  # searched in one pass over the gallery


@dataclass(frozen=True)
class Gallery:
    """Known faces; the arrays may be memory-mapped."""

    embeddings: np.ndarray
    labels: np.ndarray
    names: list[str]
    weights: str


@dataclass(frozen=True)
class Identified:
    """A face and the nearest identities, best first."""

    image: str
    names: list[str]
    cosines: list[float]
    landmarks: list[list[float]] | None = None


class Aligned:
    """A folder of identities whose images are aligned by the landmarks of a CSV (paths relative to the
    folder).
    """

    def __init__(self, source: FolderFaces, landmarks: dict[str, np.ndarray], size: int) -> None:
        self.source, self.landmarks, self.size = source, landmarks, size
        self.num_classes, self.names, self.left_out = source.num_classes, source.names, source.left_out

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions."""
        return self.source.labels()

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Aligned image uint8 [S, S, 3] and label; an image without landmarks is a damaged record."""
        name = self.source.name(index)
        if name not in self.landmarks:
            raise DamagedRecordError(name, "no landmarks for it")
        image, label = self.source.read(index)
        return align_face(image, self.landmarks[name], self.size), label


def build_gallery(
    options: EmbedOptions,
    data: str,
    out: Path,
    *,
    landmarks: Path | None = None,
    per_identity: bool = True,
    overwrite: bool = False,
) -> tuple[Gallery, tuple[str, ...]]:
    """Embed a source into a gallery, one mean vector an identity or one an image; also the damaged records.

    Raises ValueError where `out` exists, landmarks are given for another source than a folder, or nothing is
    readable.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: --overwrite, or another name")
    embedder = load_embedder(options)
    source = open_faces(data, size=embedder.image_size)
    if landmarks is not None:
        if not isinstance(source, FolderFaces):
            raise ValueError(f"landmarks go with folder:PATH, not with {data}")
        source = Aligned(source, read_landmarks(landmarks), embedder.image_size)
    found = embedder.source(source)
    if not len(found.positions):
        raise ValueError(f"{data}: none of {len(source)} images can be read; first: {found.damaged[0]}")
    rows, labels = found.embeddings, found.labels
    if per_identity:
        rows, labels = identity_templates(rows, labels)
    gallery = Gallery(rows, labels, identity_names(source), fingerprint(options.weights))
    save_gallery(gallery, out)
    left_out = left_out_text(getattr(source, "left_out", {}))
    return gallery, (*found.damaged, *([f"{data}{left_out}"] if left_out else []))


def identity_names(source: FaceSource) -> list[str]:
    """Names of a source's identities; their numbers where it has none."""
    return list(getattr(source, "names", None) or map(str, range(source.num_classes)))


def save_gallery(gallery: Gallery, out: Path) -> None:
    """Write a gallery folder; it appears when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with complete(out) as folder:
        folder.mkdir()
        np.save(folder / "embeddings.npy", gallery.embeddings.astype(np.float32))
        np.save(folder / "labels.npy", gallery.labels.astype(np.int64))
        text = json.dumps({"names": gallery.names, "weights": gallery.weights}, indent=1)
        (folder / "gallery.json").write_text(text)


def load_gallery(path: Path) -> Gallery:
    """Open a gallery, its arrays memory-mapped. Raises ValueError where it is none, or incomplete."""
    try:
        described = json.loads((path / "gallery.json").read_text())
        embeddings = np.load(path / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(path / "labels.npy", allow_pickle=False)
        gallery = Gallery(embeddings, labels, list(described["names"]), described["weights"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no gallery: {error}") from error
    if len(gallery.labels) != len(gallery.embeddings) or gallery.labels.max(initial=-1) >= len(gallery.names):
        raise ValueError(f"{path} is no gallery: {len(labels)} labels for {len(embeddings)} embeddings")
    return gallery


def identify(
    options: EmbedOptions,
    gallery_path: Path,
    images: Sequence[Path],
    *,
    k: int = 5,
    landmarks: Path | None = None,
    detector: str | None = None,
) -> tuple[list[Identified], list[str]]:
    """The k nearest identities of each image, or of each face that a detector finds; also what could not be
    read.

    Raises ValueError for a gallery of another network, no images, or a detector that isn't installed.
    """
    gallery = load_gallery(gallery_path)
    if gallery.weights != fingerprint(options.weights):
        raise ValueError(f"{gallery_path} was made with other weights than {options.weights}")
    paths, damaged = _image_paths(images)
    if not paths:
        raise ValueError(f"no image at {', '.join([*map(str, images), *damaged])}")
    embedder = load_embedder(options)
    find = None if detector is None else load_detector(detector)
    known = None if landmarks is None else read_landmarks(landmarks)
    results: list[Identified] = []
    pending: list[_Face] = []
    for path in paths:
        try:
            found = _faces(path, embedder.image_size, known, find)
            pending += found
            damaged += [] if found else [f"{printable(str(path))}: no face found"]
        except (DamagedRecordError, ValueError) as error:
            name = printable(str(path))
            damaged.append(f"{name}: {error}" if name not in str(error) else str(error))
        if len(pending) >= FACES_AT_ONCE:
            results += _named(pending, embedder, gallery, k)
            pending = []
    return results + _named(pending, embedder, gallery, k), damaged


@dataclass(frozen=True)
class _Face:
    image: str
    pixels: np.ndarray  # uint8 [S, S, 3]
    landmarks: np.ndarray | None


def _faces(path: Path, size: int, known: dict[str, np.ndarray] | None, find: Detector | None) -> list[_Face]:
    """Aligned faces of a picture with the landmarks they were aligned by."""
    image = decode_image(path.read_bytes(), str(path))
    if find is not None:
        found = np.asarray(find(image), float).reshape(-1, 5, 2)
        return [_Face(str(path), align_face(image, points, size), points) for points in found]
    if known is not None:
        points = known.get(str(path), known.get(path.name))
        if points is None:
            raise DamagedRecordError(str(path), "no landmarks for it")
        return [_Face(str(path), align_face(image, points, size), points)]
    return [_Face(str(path), fit_square(image, size), None)]


def _named(faces: list[_Face], embedder: Embedder, gallery: Gallery, k: int) -> list[Identified]:
    """Search the gallery once for a number of faces."""
    if not faces:
        return []
    embedder.model.eval()
    pixels = torch.from_numpy(np.stack([face.pixels for face in faces]).transpose(0, 3, 1, 2).copy())
    rows = np.concatenate([embedder.images(part) for part in pixels.split(embedder.batch_size)])
    results = []
    for face, best in zip(faces, nearest_identities(rows, gallery, k), strict=True):
        names = [printable(gallery.names[label]) for label in best]
        points = None if face.landmarks is None else face.landmarks.round(2).tolist()
        results.append(Identified(printable(face.image), names, list(best.values()), points))
    return results


def nearest_identities(probes: np.ndarray, gallery: Gallery, k: int) -> list[dict[int, float]]:
    """The k nearest identities of each probe [Q, D] (all, if the gallery has fewer) and their best cosines.

    An identity may fill many rows of a gallery of images: probes that met too few look further.
    """
    wanted = min(k, len(np.unique(gallery.labels)))
    results: list[dict[int, float]] = [{} for _ in probes]
    short, reach = np.arange(len(probes)), min(k, len(gallery.embeddings))
    while len(short):
        found = nearest(probes[short], gallery.embeddings, reach)
        for probe, places, cosines in zip(short, found.rows, found.cosines, strict=True):
            best: dict[int, float] = {}
            for row, cosine in zip(places, cosines, strict=True):
                best.setdefault(int(gallery.labels[row]), float(cosine))
            results[probe] = dict(list(best.items())[:k])
        short = np.array([probe for probe in short if len(results[probe]) < wanted], np.int64)
        reach = min(4 * reach, len(gallery.embeddings))
    return results


def _image_paths(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Images among files and folders, and a line for each folder with anything else."""
    missing = [printable(str(path)) for path in given if not path.exists()]
    if missing:
        raise ValueError(f"no file or folder {', '.join(missing)}")
    paths: list[Path] = []
    told: list[str] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        left_out = Counter[str]()
        for entry in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in entry.relative_to(path).parts)
            if not hidden and is_image_file(entry) and entry.is_file():
                paths.append(entry)
            elif not entry.is_dir():
                left_out["hidden" if hidden else kind_of_file(entry)] += 1
        if left_out:
            told.append(f"{printable(str(path))}{left_out_text(left_out)}")
    return paths, told


def fingerprint(weights: Path) -> str:
    """A digest of a file of weights: embeddings of different networks must not be compared."""
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"weights {weights} cannot be read: {error.strerror}") from error


def load_detector(name: str) -> Detector:
    """A face detector the user has installed: `insightface`, `facenet-pytorch`, or `package.module:callable`.

    A callable of one's own takes uint8 [H, W, 3] in RGB order and returns landmarks [F, 5, 2] (x, y). Raises
    ValueError where it isn't there.
    """
    try:
        if name == "insightface":
            return _insightface()
        if name == "facenet-pytorch":
            return _facenet()
        module, separator, attribute = name.partition(":")
        if not separator:
            raise ImportError("neither insightface, facenet-pytorch nor package.module:callable")
        found: Detector = getattr(importlib.import_module(module), attribute)
        return found
    except (ImportError, AttributeError) as error:
        raise ValueError(f"detector {name!r} is not at hand: {error}") from error


def _insightface() -> Detector:
    application = importlib.import_module("insightface.app").FaceAnalysis(allowed_modules=["detection"])
    application.prepare(ctx_id=-1)

    def find(image: np.ndarray) -> np.ndarray:
        return _landmarks([face.kps for face in application.get(image[:, :, ::-1])])

    return find


def _facenet() -> Detector:
    network: Any = importlib.import_module("facenet_pytorch").MTCNN(keep_all=True)

    def find(image: np.ndarray) -> np.ndarray:
        _, _, points = network.detect(image, landmarks=True)
        return _landmarks([] if points is None else list(points))

    return find


def _landmarks(points: list[Any]) -> np.ndarray:
    return np.array(points, float).reshape(-1, 5, 2)
