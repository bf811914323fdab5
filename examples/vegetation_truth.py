"""Vegetation by near infrared: labels of four-band photographs, and how well a map agrees with them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiling import open_raster

NONE = 255
BINS = 128


@dataclass(frozen=True)
class Result:
    """Agreement with the near infrared on the newest date, and where the files are.

    all_vegetation: the IoU of calling everything vegetation. majority: the accuracy of the commoner class.
    """

    iou: float
    accuracy: float
    all_vegetation: float
    majority: float
    prediction: Path
    picture: Path


def ndvi(scene: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(NIR - red) / (NIR + red) of the stored brightness, [4, H, W] to [H, W]; 0 where both are 0."""
    red, infrared = scene[0].astype(np.float32), scene[3].astype(np.float32)
    return (infrared - red) / np.maximum(infrared + red, 1)


def upper_threshold(values: NDArray[np.float32]) -> float:
    """The upper of the two thresholds that part values [N] into three classes with most variance between.

    Otsu (1979), A threshold selection method from gray-level histograms, section V: the best split maximises
    the sum over classes of (sum of values)^2 / count. For NDVI the classes are water, soil or dry plants, and
    green plants. NAIP stores brightness stretched anew for every flight, no reflectance, so no fixed NDVI
    means the same on two dates; a threshold from the date's own histogram follows the stretch.
    """
    counts, edges = np.histogram(values, BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    number = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    total = np.concatenate([[0], np.cumsum(counts * centres)])
    inner = np.arange(1, BINS)
    low, high = inner[:, None], inner[None, :]

    def weight(first: NDArray[np.int64] | int, last: NDArray[np.int64] | int) -> NDArray[np.float64]:
        return np.asarray((total[last] - total[first]) ** 2 / np.maximum(number[last] - number[first], 1))

    between = np.where(low < high, weight(0, low) + weight(low, high) + weight(high, BINS), -np.inf)
    return float(edges[inner[np.unravel_index(between.argmax(), between.shape)[1]]])


def vegetation_labels(scene: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """1 where NDVI exceeds the scene's own threshold, 0 elsewhere, 255 without data; [4, H, W] to [H, W]."""
    index, seen = ndvi(scene), scene.any(axis=0)
    if not seen.any():
        return np.full(seen.shape, NONE, np.uint8)
    return np.where(seen, index > upper_threshold(index[seen]), NONE).astype(np.uint8)


def by_date(scenes: Sequence[Path]) -> list[Path]:
    """Oldest first, by the last eight digits in a row of each name."""
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} scenes; at least an older and a newer one are needed")
    dates = {scene: re.findall(r"\d{8}", scene.name) for scene in scenes}
    for scene, found in dates.items():
        if not found:
            raise ValueError(f"{scene}: no date of eight digits in the name")
    return sorted(scenes, key=lambda scene: dates[scene][-1])


def compare(scene: Path, prediction: Path, picture: Path) -> Result:
    """Score a prediction against the scene's near infrared, and draw both."""
    pixels, found = open_raster(scene).read(), open_raster(prediction).read()[0]
    truth = vegetation_labels(pixels)
    seen = truth != NONE
    both = int(((truth == 1) & (found == 1) & seen).sum())
    either = int((((truth == 1) | (found == 1)) & seen).sum())
    share = float((truth == 1)[seen].mean())
    draw(pixels, truth, found, picture)
    accuracy = float((truth == found)[seen].mean())
    return Result(both / max(1, either), accuracy, share, max(share, 1 - share), prediction, picture)


def draw(
    pixels: NDArray[np.uint8], truth: NDArray[np.uint8], found: NDArray[np.uint8], picture: Path
) -> None:
    """The scene, its vegetation by near infrared, and what the network saw in its colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    colours = ListedColormap(["#d9cfb4", "#2e7d32"])
    panels = (
        (np.moveaxis(pixels[:3], 0, -1), "red, green, blue: what the network sees"),
        (np.ma.masked_equal(truth, NONE), "vegetation by near infrared"),
        (np.ma.masked_equal(found, NONE), "vegetation found"),
    )
    for axes, (image, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(image, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    FigureCanvasAgg(figure).print_png(str(picture))


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
