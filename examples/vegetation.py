"""Vegetation from colour alone: trained on older aerial photographs, predicting the newest.

The near-infrared band tells vegetation (NDVI), so it makes the labels; the network sees red, green and blue
only. Trained on five dates of one place, it finds the vegetation of a sixth, which it never saw.

    python examples/vegetation.py ../shared/data/rasters/naip vegetation/
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.train_raster import TrainOptions, train
from tiling import open_raster

MODEL = "bigvision.models.small_unet:small_unet?in_channels=3&classes=2&width=16&depth=5"
# Healthy vegetation reflects far more near infrared than red; bare soil and water do not.
THRESHOLD = 0.0  # of uncalibrated brightness: water and bare soil lie below
NONE = 255
READING = {"bands": (1, 2, 3), "scale": 255.0, "mean": (0.39, 0.43, 0.35), "std": (0.13, 0.1, 0.09)}


@dataclass(frozen=True)
class Result:
    """Agreement with the near infrared on the newest date, and where the files are."""

    iou: float
    accuracy: float
    prediction: Path
    picture: Path


def vegetation_labels(scene: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """1 where NDVI exceeds the threshold, 0 elsewhere, 255 without data; [4, H, W] to [H, W]."""
    red, infrared = scene[0].astype(np.float32), scene[3].astype(np.float32)
    ndvi = (infrared - red) / np.maximum(infrared + red, 1)
    return np.where(scene.any(axis=0), ndvi > THRESHOLD, NONE).astype(np.uint8)


def write_labels(scene: Path, path: Path) -> None:
    """The labels of one scene on its own grid."""
    with rasterio.open(scene) as file:
        labels = vegetation_labels(file.read())
        profile = file.profile | {"count": 1, "nodata": NONE, "photometric": "minisblack"}
    with rasterio.open(path, "w", **profile) as file:
        file.write(labels, 1)


def vegetation(scenes: Path, out: Path, steps: int = 400) -> Result:
    """Train on all dates in `scenes` but the newest, predict that one, compare with its near infrared."""
    dates = sorted(scenes.glob("*.tif"), key=lambda path: re.findall(r"\d{8}", path.name)[-1])
    if len(dates) < 2:
        raise ValueError(f"{scenes}: {len(dates)} scenes; at least an older and a newer one are needed")
    *older, newest = dates
    (out / "labels").mkdir(parents=True, exist_ok=True)
    lines = ["scene,labels"]
    for scene in older:
        write_labels(scene, out / "labels" / scene.name)
        lines.append(f"{scene.resolve()},labels/{scene.name}")
    (out / "pairs.csv").write_text("\n".join(lines) + "\n")
    training = train(
        out / "pairs.csv",
        out / "run",
        TrainOptions(
            MODEL,
            epochs=max(1, steps // 50),
            steps_per_epoch=min(steps, 50),
            crop=192,
            batch=6,
            jitter=0.5,
            lr=0.003,
            weight_decay=0.01,
            warmup=20,
            overwrite=True,
            **READING,
        ),
    )
    prediction = out / newest.name
    run_scene(
        (str(newest),),
        prediction,
        Options(MODEL, weights=training.weights, overwrite=True, **READING),
    )
    return compare(newest, prediction, out / "vegetation.png")


def compare(scene: Path, prediction: Path, picture: Path) -> Result:
    """Score a prediction against the scene's near infrared, and draw both."""
    pixels, found = open_raster(scene).read(), open_raster(prediction).read()[0]
    truth = vegetation_labels(pixels)
    seen = truth != NONE
    both = int(((truth == 1) & (found == 1) & seen).sum())
    either = int((((truth == 1) | (found == 1)) & seen).sum())
    draw(pixels, truth, found, picture)
    return Result(both / max(1, either), float((truth == found)[seen].mean()), prediction, picture)


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
    parser.add_argument("scenes", type=Path, help="folder of dated four-band GeoTIFFs")
    parser.add_argument("out", type=Path, help="folder for labels, run and prediction")
    given = parser.parse_args()
    result = vegetation(given.scenes, given.out)
    print(f"IoU {result.iou:.4f}, accuracy {result.accuracy:.4f}\n{result.prediction}\n{result.picture}")
