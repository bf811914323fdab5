"""Scenes and their labels, listed in a CSV file and checked before any work starts.

    scene,labels,split
    2019/a.tif,2019/a_classes.tif,train
    2020/a.tif,2020/a_classes.tif,val

Paths are relative to the CSV file; `split` is optional and `train` by default.
Shapes: C bands, H rows, W columns.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Normalisation:
    """What happens to pixel values before a network sees them: (value / scale - mean) / std, band by band.

    Missing and non-finite values become 0, which is the mean.
    """

    scale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def check(self, channels: int) -> None:
        """ValueError unless there is one mean and one positive std a band (or one for all)."""
        if not self.scale:
            raise ValueError("the scale that values are divided by can't be 0")
        for name, values in (("means", self.mean), ("standard deviations", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(f"{len(values)} {name} for {channels} bands")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"standard deviations must be positive, not {self.std}")

    def __call__(self, data: NDArray[np.generic], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Values [C, h, w] of any dtype and where they are valid [h, w], as float32 [C, h, w]."""
        values = data.astype(np.float32)
        if self.scale != 1:
            values /= np.float32(self.scale)
        if self.mean is not None:
            values -= np.asarray(self.mean, np.float32)[:, None, None]
        if self.std is not None:
            values /= np.asarray(self.std, np.float32)[:, None, None]
        values[:, ~valid] = 0
        if not np.issubdtype(data.dtype, np.integer):
            values[~np.isfinite(values)] = 0
        return values


@dataclass(frozen=True)
class LabelledScene:
    """An opened pair, on one grid. `read` gives what a network trains on."""

    pair: Pair
    image: Raster
    labels: Raster
    normalisation: Normalisation
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        return self.image.shape

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Normalised image [C, h, w] and classes [h, w] of a window, IGNORE where either has no data."""
        return self.read_image(window), self.read_target(window)

    def read_image(self, window: Window) -> NDArray[np.float32]:
        """Normalised image [C, h, w] of a window, 0 where it has no data."""
        data = self.image.read(window)
        return self.normalisation(data, self.image.mask(window, data=data))

    def read_target(self, window: Window) -> NDArray[np.uint8]:
        """Classes [h, w] of a window, IGNORE where the labels or the image have no data.

        Raises:
            ValueError: for a class that the model doesn't have, naming file and place.
        """
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
        seen = labelled & self.image.mask(window)
        return np.where(seen, raw[0], IGNORE).astype(np.uint8)

    def class_counts(self) -> NDArray[np.int64]:
        """Pixels of each class [classes], read block by block; raises as `read_target` does."""
        counts = np.zeros(self.classes, np.int64)
        for tile in TileGrid(self.shape[1], self.shape[2], 2048):
            target = self.read_target(tile.core)
            counts += np.bincount(target.ravel(), minlength=IGNORE + 1)[: self.classes]
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


def open_pair(
    pair: Pair,
    *,
    classes: int,
    bands: Sequence[int] | None = None,
    normalisation: Normalisation | None = None,
) -> LabelledScene:
    """Open a scene and its labels; only their headers are read.

    Raises:
        ValueError: where one doesn't open, the labels have several bands or fractions, or size, CRS or
            transform differ; both values are named.
    """
    image, labels = open_raster(pair.scene, bands=bands), open_raster(pair.labels)
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
    norm = normalisation or Normalisation()
    norm.check(image.shape[0])
    return LabelledScene(pair, image, labels, norm, classes)
