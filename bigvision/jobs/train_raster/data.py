"""The labelled scenes of a run, opened and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigvision.jobs.process.scene import open_scene
from bigvision.jobs.train_raster.options import TrainOptions
from datasets.pairs import LabelledScene, Pair, open_labels
from tiling import Raster


@dataclass(frozen=True)
class TrainingData:
    """Scenes to train on and scenes held out, with one number of bands.

    counts: pixels of each class in the training labels.
    """

    train: tuple[LabelledScene, ...]
    validation: tuple[LabelledScene, ...]
    counts: NDArray[np.int64]


def channels_of(pairs: Sequence[Pair], options: TrainOptions) -> int:
    """The bands of every scene; ValueError where they differ or there is nothing to train on."""
    if not any(pair.split == "train" for pair in pairs):
        raise ValueError("no scene has split train: there is nothing to train on")
    bands = {pair.scene: open_scene([pair.scene], options.reading()).shape[0] for pair in pairs}
    first = pairs[0].scene
    for scene, count in bands.items():
        if count != bands[first]:
            raise ValueError(f"{scene} has {count} bands, {first} has {bands[first]}")
    return bands[first]


def open_data(pairs: Sequence[Pair], options: TrainOptions, classes: int) -> TrainingData:
    """Open every pair and read its labels once: grids must match and classes be known.

    Raises:
        ValueError: as `open_labels` and `LabelledScene.read` do, or where no training pixel has a class.
    """
    scenes = [_open(pair, options, classes) for pair in pairs]
    train = tuple(scene for scene in scenes if scene.pair.split == "train")
    held_out = tuple(scene for scene in scenes if scene.pair.split == "val")
    counts = np.sum([scene.class_counts() for scene in train], axis=0)
    for scene in held_out:
        scene.class_counts()
    if not counts.any():
        raise ValueError(f"no pixel of {len(train)} training scenes has a class: all are nodata")
    return TrainingData(train, held_out, counts)


def _open(pair: Pair, options: TrainOptions, classes: int) -> LabelledScene:
    image = open_scene([pair.scene], options.reading())
    return LabelledScene(pair, image, open_labels(pair, image.raster), classes)


def pixel_type(scene: LabelledScene) -> np.dtype[Any]:
    """In which the image of a scene is stored."""
    raster: Raster = scene.image.raster  # type: ignore[attr-defined]
    return raster.dtype


def check_unchanged(scene: LabelledScene, options: TrainOptions) -> None:
    """ValueError where the files of a scene are no longer what they were when training began."""
    now = _open(scene.pair, options, scene.classes)
    pairs: tuple[tuple[str, Raster, Raster], ...] = (
        (scene.pair.scene, now.image.raster, scene.image.raster),  # type: ignore[attr-defined]
        (scene.pair.labels, now.labels, scene.labels),
    )
    for name, found, known in pairs:
        if found.shape != known.shape:
            raise ValueError(f"{name}: is {found.shape} now, was {known.shape} when training began")


def balanced_weights(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """A weight a class, inverse to its pixels; mean 1 over the pixels, 0 for absent classes."""
    present = counts > 0
    weights = np.zeros(len(counts), np.float64)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.astype(np.float32)
