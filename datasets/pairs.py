"""Scenes and their labels, listed in a CSV file and checked before any work starts.

    scene,labels,split
    2019/a.tif,2019/a_classes.tif,train
    2020/a.tif,2020/a_classes.tif,val

Paths are relative to the CSV file; `split` is optional and `train` by default.
Shapes: C bands, H rows, W columns.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling import Raster, TileGrid, open_raster

IGNORE = 255
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Pair:
    """One scene and the raster of its classes: paths or URLs, and which part of the work they serve."""

    scene: str
    labels: str
    split: str = "train"


class Pixels(Protocol):
    """An image as a network sees it: normalised, 0 where it has no data."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Values [C, h, w] of a window and where it has data [h, w]."""


@dataclass(frozen=True)
class LabelledScene:
    """An image and its labels on one grid. `read` gives what a network trains on."""

    pair: Pair
    image: Pixels
    labels: Raster
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self.image.shape

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image [C, h, w] and classes [h, w] of a window, IGNORE where either has no data.

        Raises:
            ValueError: for a class that the model doesn't have, naming file and place.
        """
        image, valid = self.image.read(window)
        return image, self.truth(window, valid)

    def truth(self, window: Window, valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Classes [h, w] of a window, IGNORE where they have no data or the image isn't `valid` [h, w]."""
        return np.where(valid, self._classes(window), IGNORE).astype(np.uint8)

    def _classes(self, window: Window) -> NDArray[np.generic]:
        """Labels [h, w] of a window, IGNORE where they have no data."""
        raw = self.labels.read(window)
        labelled = self.labels.mask(window, data=raw) & (raw[0] != IGNORE)
        unknown = labelled & ((raw[0] < 0) | (raw[0] >= self.classes))
        if unknown.any():
            row, col = (int(at[0]) for at in np.nonzero(unknown))
            raise ValueError(
                f"{self.pair.labels}: class {raw[0, row, col]} at row {window.row_off + row}, column "
                f"{window.col_off + col}; the model has classes 0 to {self.classes - 1} "
                f"(the labels' nodata value, or {IGNORE}, marks pixels without a class)"
            )
        return np.where(labelled, raw[0], IGNORE)

    def class_counts(self) -> NDArray[np.int64]:
        """Pixels of each class [classes], by the labels alone; raises as `read` does."""
        counts = np.zeros(self.classes, np.int64)
        for tile in TileGrid(self.shape[1], self.shape[2], 2048):
            classes = self._classes(tile.core).ravel().astype(np.int64)
            counts += np.bincount(classes, minlength=IGNORE + 1)[: self.classes]
        return counts


def read_pairs(path: Path) -> tuple[Pair, ...]:
    """The pairs a CSV file lists, in its order.

    Raises:
        ValueError: naming file and line, for a missing file, column or value, an unknown split, or no pairs.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list of scenes")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"scene", "labels"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: has no column {' nor '.join(sorted(missing))}; it needs scene,labels")
        pairs = tuple(_pair(path, rows.line_num, row) for row in rows)
    if not pairs:
        raise ValueError(f"{path}: lists no scenes")
    return pairs


def _pair(path: Path, line: int, row: dict[str, str | None]) -> Pair:
    scene, labels = ((row.get(name) or "").strip() for name in ("scene", "labels"))
    split = (row.get("split") or "").strip() or "train"
    if not scene or not labels:
        raise ValueError(f"{path}, line {line}: a pair needs both scene and labels")
    if split not in SPLITS:
        raise ValueError(f"{path}, line {line}: split {split!r} is neither {' nor '.join(SPLITS)}")
    return Pair(_resolve(path, scene), _resolve(path, labels), split)


def _resolve(path: Path, address: str) -> str:
    remote = "://" in address or address.startswith("/vsi")
    return address if remote else str(path.parent / address)


def open_labels(pair: Pair, image: Raster) -> Raster:
    """The labels of a pair, which lie on the grid of its image; only headers are read.

    Raises:
        ValueError: where they don't open, have several bands or fractions, or differ from the image in
            size, CRS or transform; both values are named.
    """
    labels = open_raster(pair.labels)
    if labels.shape[0] != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{pair.labels}: labels are one band of whole numbers, not {labels.shape[0]} of {labels.dtype}"
        )
    if labels.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"{pair.labels}: {labels.height} x {labels.width} labels for {image.height} x {image.width} "
            f"pixels of {pair.scene}"
        )
    if labels.crs != image.crs:
        raise ValueError(f"{pair.labels}: CRS {labels.crs}, but {pair.scene} has {image.crs}")
    if not labels.transform.almost_equals(image.transform, 1e-6 * abs(image.transform.a)):
        raise ValueError(
            f"{pair.labels}: transform {labels.transform.to_gdal()}, but {pair.scene} has "
            f"{image.transform.to_gdal()}"
        )
    return labels
