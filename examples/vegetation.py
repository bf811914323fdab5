"""Vegetation from colour alone: trained on older aerial photographs, predicting the newest.

The near-infrared band tells vegetation (NDVI), so it makes the labels; the network sees red, green and blue
only, each scene's bands brought to mean 0 and standard deviation 1 by that scene's own statistics.

    python examples/vegetation.py vegetation/ ../shared/data/rasters/naip/*.tif

Leaving the newest file out predicts the second newest from those before it: that is how the settings below
were chosen, without sight of the newest.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.train_raster import TrainOptions, train
from tiling import open_raster

MODEL = f"{Path(__file__).with_name('vegetation_network.py')}:texture?width=32"
COLOURS = (1, 2, 3)
NONE = 255
BINS = 128


@dataclass(frozen=True)
class Training:
    """What was tuned, on the second newest date."""

    steps: int = 250
    crop: int = 192
    batch: int = 6
    jitter: float = 0.95
    lr: float = 0.01
    weight_decay: float = 0.01
    dtype: str = "bfloat16"
    seed: int = 0

    def options(self) -> TrainOptions:
        """The same for `bigvision train`."""
        return TrainOptions(
            MODEL,
            epochs=max(1, self.steps // 50),
            steps_per_epoch=min(self.steps, 50),
            crop=self.crop,
            batch=self.batch,
            jitter=self.jitter,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=20,
            dtype=self.dtype,
            seed=self.seed,
            overwrite=True,
        )


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


def statistics(scene: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue over the scene's pixels with data."""
    with rasterio.open(scene) as file:
        bands = [file.read(band, masked=True).compressed().astype(np.float64) for band in COLOURS]
    return tuple(float(band.mean()) for band in bands), tuple(float(band.std()) for band in bands)


def write_pair(scene: Path, out: Path) -> str:
    """One date's colours in its own units, and its labels, under `out`; their line of the list of pairs."""
    mean, std = (np.array(values)[:, None, None] for values in statistics(scene))
    with rasterio.open(scene) as file:
        labels = vegetation_labels(file.read())
        colours = file.read(COLOURS, masked=True)
        profile = file.profile | {"photometric": "minisblack"}
    standard = ((colours - mean) / std).astype(np.float32).filled(np.nan)
    for folder, values, missing in (("scenes", standard, np.nan), ("labels", labels[None], NONE)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        kind = {"count": len(values), "dtype": values.dtype.name, "nodata": missing}
        with rasterio.open(out / folder / scene.name, "w", **profile | kind) as file:
            file.write(values)
    return f"scenes/{scene.name},labels/{scene.name}\n"


def vegetation(scenes: Sequence[Path], out: Path, training: Training | None = None) -> Result:
    """Train on all dates but the newest, predict that one, compare with its near infrared.

    Raises:
        ValueError: with fewer than two scenes, or one whose name holds no date of eight digits.
    """
    *older, newest = by_date(scenes)
    settings = training or Training()
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.csv").write_text("scene,labels\n" + "".join(write_pair(scene, out) for scene in older))
    weights = train(
        out / "pairs.csv",
        out / "run",
        settings.options(),
    ).weights
    mean, std = statistics(newest)
    prediction = out / newest.name
    reading = Options(MODEL, weights=weights, bands=COLOURS, mean=mean, std=std, overwrite=True)
    run_scene((str(newest),), prediction, reading)
    return compare(newest, prediction, out / "vegetation.png")


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for labels, run and prediction")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result = vegetation(given.scenes, given.out)
    print(f"IoU {result.iou:.4f} (everything vegetation: {result.all_vegetation:.4f})")
    print(f"accuracy {result.accuracy:.4f} (the commoner class: {result.majority:.4f})")
    print(f"{result.prediction}\n{result.picture}")
