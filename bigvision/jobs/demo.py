"""The demonstration: a scene made, a network trained on a third of it, all of it processed and scored."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.usage import MemoryWatch
from bigvision.jobs.train_raster import TrainOptions, train
from datasets.scene_files import write_scene
from datasets.scenes import CLASSES, COLOURS, Scene
from tiling import Raster, TileGrid, open_raster, to_cog
from tiling.publish import publish, staging_name

MODEL = "bigvision.models.small_unet:small_unet"
MEAN, STD = (0.45, 0.42, 0.33, 0.45), (0.2,)
_STEPS_AN_EPOCH = 120

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured, and where its files are.

    accuracy: share of right pixels where the network did not train. peak_bytes: of the process while it
        processed the scene. megapixels_per_second: of `bigvision process`, end to end.
    """

    accuracy: float
    megapixels_per_second: float
    peak_bytes: int
    seconds: float
    cog: Path
    picture: Path


def demo(out: Path, size: int = 3072, *, steps: int = 480, say: Say = print) -> DemoResult:
    """Run the demonstration on a scene of `size` x `size` pixels, into the folder `out`.

    Its own files there are replaced. Raises ValueError for a size below 96 or a folder that can't be made.
    """
    if size < 96:
        raise ValueError(f"--size must be at least 96 pixels, got {size}")
    begun = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: can't be made: {error.strerror}") from error
    say(f"1  making a scene of {size} x {size} pixels, 4 bands: {out / 'scene.tif'}")
    scene = Scene(size, size)
    image = write_scene(scene, out / "scene.tif", workers=2, overwrite=True)
    trained = Window(0, 0, size // 3, size)
    say("2  training a small U-Net on its western third")
    training = _train(scene, image, trained, out, steps, say)
    say("3  bigvision process over the whole scene")
    options = Options(MODEL, weights=training, scale=255, mean=MEAN, std=STD, overwrite=True, dtype="float32")
    cog = out / "prediction" / "scene.tif"
    cog.parent.mkdir(exist_ok=True)
    with MemoryWatch(0.05) as watch:
        outcome = run_scene((str(out / "scene.tif"),), cog, options)
    prediction = open_raster(cog)
    accuracy = _accuracy(scene, prediction, trained.width)
    picture = out / "prediction.png"
    _draw(image, prediction, trained.width, accuracy, picture)
    rate = outcome.pixels / 1e6 / outcome.seconds
    seconds = time.perf_counter() - begun
    return DemoResult(accuracy, rate, watch.peak, seconds, cog, picture)


def _train(scene: Scene, image: Raster, window: Window, out: Path, steps: int, say: Say) -> Path:
    """Train on one window of the scene; the path of the weights."""
    labels = write_scene(scene, out / "labels.tif", labels=True, workers=2, overwrite=True)
    to_cog(image.select(window=window), out / "train.tif", overwrite=True)
    to_cog(labels.select(window=window), out / "train_labels.tif", overwrite=True)
    (out / "pairs.csv").write_text("scene,labels\ntrain.tif,train_labels.tif\n")
    options = TrainOptions(
        MODEL,
        scale=255,
        mean=MEAN,
        std=STD,
        epochs=max(1, steps // _STEPS_AN_EPOCH),
        steps_per_epoch=min(steps, _STEPS_AN_EPOCH),
        crop=256,
        batch=4,
        lr=0.005,
        seed=1,
        warmup=steps // 20,
        overwrite=True,
    )
    return train(out / "pairs.csv", out / "run", options, lambda text: say(f"   {text}")).weights


def _accuracy(scene: Scene, prediction: Raster, first: int) -> float:
    """Share of right pixels from column `first` on, block by block."""
    right = 0
    width = scene.width - first
    for tile in TileGrid(scene.height, width, 2048):
        core = Window(tile.core.col_off + first, tile.core.row_off, tile.core.width, tile.core.height)
        truth = scene.labels(core.row_off, core.col_off, core.height, core.width)
        right += int((prediction.read(core)[0] == truth).sum())
    return right / (scene.height * width)


def _draw(image: Raster, prediction: Raster, first: int, accuracy: float, path: Path) -> None:
    """The scene beside its prediction, with a legend, at most about 1000 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    step = -(-image.height // 1000)
    left = np.moveaxis(_coarse(image, (1, 2, 3), step, "average"), 0, -1)
    right = np.array(COLOURS, np.uint8)[_coarse(prediction, (1,), step, "mode")[0]]
    figure = Figure(figsize=(13, 7.8), layout="constrained")
    titles = ("red, green, blue (the network trained left of the line)", f"classes, {accuracy:.1%} right")
    for axes, pixels, title in zip(figure.subplots(1, 2), (left, right), titles, strict=True):
        axes.imshow(pixels)
        axes.axvline(first / step, color="white", lw=1.2, ls="--")
        axes.set_title(title)
        axes.set_axis_off()
    patches = [
        Patch(color=(red / 255, green / 255, blue / 255), label=name)
        for name, (red, green, blue) in zip(CLASSES, COLOURS, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(CLASSES))
    staging = staging_name(path).with_suffix(".png")
    FigureCanvasAgg(figure).print_png(str(staging))
    publish(staging, path)


def _coarse(raster: Raster, bands: tuple[int, ...], step: int, how: str) -> NDArray[Any]:
    """Every `step`-th pixel's worth of a raster [B, h, w]."""
    size = abs(raster.transform.a) * step
    return open_raster(raster.name, bands=bands, resolution=size, resampling=how).read()
