"""Vegetation from colour with boosted trees instead of a network: the same dates, labels and scores.

What transfers from flight to flight is not brightness but its parts, each pixel's chromaticity, and how
smooth its surroundings are. Trees split on such features and don't extrapolate beyond what they have seen.
`tiling` reads, cuts and writes; any function of a tile's pixels may fill them.

    python examples/vegetation_trees.py trees/ ../shared/data/rasters/naip/*.tif
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import laplace, uniform_filter
from sklearn.ensemble import HistGradientBoostingClassifier
from vegetation import NONE, Result, by_date, compare, vegetation_labels

from tiling import Tile, create_zarr, map_tiles, open_raster, to_cog

WINDOWS = (3, 7, 15, 31, 61)  # pixels; 15 to 305 m on the ground
HALO = 32  # half the largest window, and a pixel for the Laplacian
PIXELS = 30_000  # of each date, to train on


def brightness(scene: NDArray[np.uint8]) -> float:
    """Mean of red + green + blue where there is data: a flight's exposure."""
    return float(scene[:3].sum(axis=0, dtype=np.float64)[scene.any(axis=0)].mean())


def features(scene: NDArray[np.uint8], exposure: float) -> NDArray[np.float32]:
    """[B, H, W] to [H, W, 38]: shares of red and green, brightness; their local means, deviations, grain."""
    total = scene[:3].sum(axis=0, dtype=np.float32) + 1e-6
    colour = [scene[0] / total, scene[1] / total, total / exposure]
    grain = np.abs(laplace(total / 3)) / (total / 3 + 10)
    found = list(colour)
    for size in WINDOWS:
        for band in colour:
            mean = uniform_filter(band, size)
            spread = np.sqrt(np.maximum(uniform_filter(band * band, size) - mean * mean, 0))
            found += [mean, np.log(spread + 1e-3)]
        found.append(np.log(uniform_filter(grain, size) + 1e-4))
    return np.stack(found, axis=-1).astype(np.float32)


def train(scenes: Sequence[NDArray[np.uint8]], pixels: int = PIXELS) -> HistGradientBoostingClassifier:
    """Trees that tell the labels of `pixels` random pixels of each scene [4, H, W]."""
    draw = np.random.default_rng(0)
    inputs, truths = [], []
    for scene in scenes:
        truth = vegetation_labels(scene).ravel()
        chosen = draw.permutation(np.flatnonzero(truth != NONE))[:pixels]
        inputs.append(features(scene, brightness(scene)).reshape(truth.size, -1)[chosen])
        truths.append(truth[chosen])
    trees = HistGradientBoostingClassifier(
        max_iter=120, learning_rate=0.08, max_leaf_nodes=15, l2_regularization=1.0, random_state=0
    )
    return trees.fit(np.concatenate(inputs), np.concatenate(truths))


def predict(trees: HistGradientBoostingClassifier, scene: Path, out: Path, tile: int = 512) -> None:
    """A COG of 0, 1 and 255 (no data), by tiles that see as far as the largest window."""
    raster = open_raster(scene)
    exposure = brightness(raster.read())

    def classify(pixels: NDArray[np.uint8], at: Tile) -> NDArray[np.uint8]:
        values = features(pixels, exposure)
        found = trees.predict(values.reshape(-1, values.shape[-1])).reshape(values.shape[:2])
        return np.where(pixels.any(axis=0), found, NONE).astype(np.uint8)[None]

    place = {"crs": raster.crs, "transform": raster.transform, "nodata": NONE}
    colours = {0: (217, 207, 180, 255), 1: (46, 125, 50, 255)}
    store = out.with_suffix(".zarr")
    with create_zarr(
        store, (1, *raster.shape[1:]), "uint8", **place, colormap=colours, shard=tile, overwrite=True
    ) as writer:
        map_tiles(classify, raster, writer, writer.grid(halo=HALO))
    to_cog(open_raster(store), out, overwrite=True)


def vegetation(scenes: Sequence[Path], out: Path) -> tuple[Result, float]:
    """Train on all dates but the newest, predict that one, compare with its near infrared.

    Beside it the IoU of a trivial rule: excess green above the threshold that is best on the older dates.
    """
    *older, newest = by_date(scenes)
    out.mkdir(parents=True, exist_ok=True)
    known = [open_raster(scene).read() for scene in older]
    predict(train(known), newest, out / newest.name)
    trivial = greenness_iou(open_raster(newest).read(), best_threshold(known))
    return compare(newest, out / newest.name, out / "vegetation.png"), trivial


def greenness_iou(scene: NDArray[np.uint8], threshold: float) -> float:
    """IoU of (2 green - red - blue) / (red + green + blue) > threshold (Woebbecke et al., 1995)."""
    red, green, blue = scene[:3].astype(np.float32)
    truth = vegetation_labels(scene)
    found = ((2 * green - red - blue) / np.maximum(red + green + blue, 1) > threshold) & (truth != NONE)
    return float((found & (truth == 1)).sum() / max(1, (found | (truth == 1)).sum()))


def best_threshold(scenes: Sequence[NDArray[np.uint8]]) -> float:
    """The threshold of excess green with the highest mean IoU."""
    thresholds = np.linspace(-0.2, 0.5, 71)
    means = [np.mean([greenness_iou(scene, threshold) for scene in scenes]) for threshold in thresholds]
    return float(thresholds[np.argmax(means)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for prediction and picture")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result, trivial = vegetation(given.scenes, given.out)
    print(
        f"IoU {result.iou:.4f} (everything vegetation: {result.all_vegetation:.4f}, "
        f"a threshold of greenness: {trivial:.4f})"
    )
    print(f"accuracy {result.accuracy:.4f} (the commoner class: {result.majority:.4f})")
    print(f"{result.prediction}\n{result.picture}")
