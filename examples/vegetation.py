"""Vegetation from colour alone: trained on older aerial photographs, predicting the newest.

The near-infrared band tells vegetation (NDVI), so it makes the labels; the network sees red, green and blue
only. scikit-learn fits trees to features that the network itself computes; compiled into its weights, they
are run by `bigvision process` like any other network.

    python examples/vegetation.py vegetation/ ../shared/data/rasters/naip/*.tif

Leaving the newest file out predicts the second newest from those before it.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compiled_trees import compiled
from numpy.typing import NDArray
from rasterio.windows import Window
from safetensors.torch import save_file
from sklearn.ensemble import HistGradientBoostingClassifier
from vegetation_network import WINDOWS, Surroundings
from vegetation_truth import NONE, Result, best_threshold, by_date, compare, greenness_iou, vegetation_labels

from bigvision.jobs.process.options import Options
from bigvision.jobs.process.run import run_scene
from bigvision.jobs.process.scene import open_scene
from tiling import open_raster

NETWORK = Path(__file__).with_name("vegetation_network.py")
COLOURS = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """What was chosen by leaving each of the older dates out; `pixels` are drawn from each date."""

    trees: int = 120
    leaves: int = 8
    windows: int = len(WINDOWS)
    rate: float = 0.08
    pixels: int = 30_000

    def model(self, exposure: float = 0.0) -> str:
        """What `bigvision process --model` takes; `exposure` where the network shan't find it itself."""
        return (
            f"{NETWORK}:trees?trees={self.trees}&leaves={self.leaves}&windows={self.windows}"
            f"&exposure={exposure}"
        )


def colours(scene: Path) -> NDArray[np.float32]:
    """Red, green and blue as the network gets them from `bigvision process`, [3, H, W]."""
    source = open_scene([str(scene)], Options(str(NETWORK), bands=COLOURS))
    return source.read(Window(0, 0, source.shape[2], source.shape[1]))[0]


@torch.inference_mode()
def samples(scene: Path, settings: Settings) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Features [n, F] and labels [n] of random pixels with data."""
    features = Surroundings(WINDOWS[: settings.windows])(torch.from_numpy(colours(scene))[None])
    labels = vegetation_labels(open_raster(scene).read()).ravel()
    known = np.flatnonzero(labels != NONE)
    chosen = np.random.default_rng(0).permutation(known)[: settings.pixels]
    return features[0].flatten(1).T.numpy()[chosen], labels[chosen]


def train(scenes: Sequence[Path], settings: Settings, weights: Path) -> None:
    """Fit trees to the scenes' near infrared, and save them as the network's weights."""
    inputs, truths = zip(*(samples(scene, settings) for scene in scenes), strict=True)
    model = HistGradientBoostingClassifier(
        max_iter=settings.trees,
        learning_rate=settings.rate,
        max_leaf_nodes=settings.leaves,
        l2_regularization=1.0,
        random_state=0,
    ).fit(np.concatenate(inputs), np.concatenate(truths))
    state = compiled(model, settings.leaves)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"forest.{name}": value for name, value in state.items()}, weights)


def processing(model: str, weights: Path) -> Options:
    """The options of `bigvision process --dtype float32 --bands 1,2,3`."""
    return Options(model, weights=weights, bands=COLOURS, dtype="float32", overwrite=True)


def vegetation(scenes: Sequence[Path], out: Path, settings: Settings | None = None) -> tuple[Result, float]:
    """Train on all dates but the newest, predict that one, compare with its near infrared.

    Beside it the IoU of a trivial rule: excess green above the threshold that is best on the older dates.

    Raises:
        ValueError: with fewer than two scenes, or one whose name holds no date of eight digits.
    """
    *older, newest = by_date(scenes)
    settings = settings or Settings()
    begun = time.perf_counter()
    train(older, settings, out / "trees.safetensors")
    trained = time.perf_counter()
    prediction = out / newest.name
    run_scene((str(newest),), prediction, processing(settings.model(), out / "trees.safetensors"))
    print(f"trained in {trained - begun:.0f} s, processed in {time.perf_counter() - trained:.1f} s")
    best = best_threshold([open_raster(scene).read() for scene in older])
    trivial = greenness_iou(open_raster(newest).read(), best)
    return compare(newest, prediction, out / "vegetation.png"), trivial


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for weights, prediction and picture")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result, trivial = vegetation(given.scenes, given.out)
    print(
        f"IoU {result.iou:.4f} (everything vegetation: {result.all_vegetation:.4f}, "
        f"a threshold of greenness: {trivial:.4f})"
    )
    print(f"accuracy {result.accuracy:.4f} (the commoner class: {result.majority:.4f})")
    print(f"{result.prediction}\n{result.picture}")
