"""Vegetation from colour at half the compute: a cheap network, and the full one where a gate wants it.

Photographs, labels and the full network are those of `vegetation.py`; cheap network, full network and gate
are trained together by `bigvision train --route`, and the newest photograph is processed three times: by the
cheap network alone, by the full one alone, and routed.

    python examples/vegetation_routed.py routed/ ../shared/data/rasters/naip/*.tif
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vegetation import COLOURS, MODEL, Training, by_date, compare, statistics, write_pair

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.route_forecast import forecast_route
from bigvision.jobs.train_raster import TrainOptions, train

CHEAP = f"{Path(__file__).with_name('vegetation_network.py')}:texture?width=8"  # a quarter of the channels
REGION, BUDGET = 32, 0.33


@dataclass(frozen=True)
class Routed:
    """IoU of the three results on the newest date; share: FLOPs of the routed one over the full one's."""

    cheap: float
    routed: float
    full: float
    share: float
    summary: str


def routed_vegetation(scenes: Sequence[Path], out: Path, training: Training | None = None) -> Routed:
    """Train the route on all dates but the newest, and process that one; ValueError as `vegetation`."""
    *older, newest = by_date(scenes)
    settings = training or Training()
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.csv").write_text("scene,labels\n" + "".join(write_pair(scene, out) for scene in older))
    route = out / "ROUTE.toml"
    route.write_text(
        f'region = {REGION}\ngate = "learned"\nbudget = {BUDGET}\n\n[cheap]\nmodel = "{CHEAP}"\n'
    )
    run = train(out / "pairs.csv", out / "run", options(settings, route)).folder
    mean, std = statistics(newest)
    full = Options(
        MODEL, weights=run / "weights.safetensors", bands=COLOURS, mean=mean, std=std, dtype="float32",
        overwrite=True,
    )  # fmt: skip
    both = replace(full, route=run / "ROUTE.toml")
    jobs = {
        "cheap": replace(full, model=CHEAP, weights=run / "cheap.safetensors"),
        "full": full,
        "routed": both,
    }
    found, summary = {}, ""
    for name, job in jobs.items():
        target = out / name / newest.name
        target.parent.mkdir(exist_ok=True)
        summary = run_scene((str(newest),), target, job).routed
        found[name] = compare(newest, target, out / f"{name}.png").iou
    share = max(plan.share for plan in forecast_route(str(newest), both))
    return Routed(found["cheap"], found["routed"], found["full"], share, summary)


def options(settings: Training, route: Path) -> TrainOptions:
    """As `vegetation.py` trains its network, plus the route."""
    return TrainOptions(
        MODEL,
        route=route,
        epochs=max(1, settings.steps // 50),
        steps_per_epoch=min(settings.steps, 50),
        crop=settings.crop,
        batch=settings.batch,
        jitter=settings.jitter,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup=20,
        dtype=settings.dtype,
        seed=settings.seed,
        overwrite=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for labels, run and results")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result = routed_vegetation(given.scenes, given.out)
    print(f"IoU: cheap alone {result.cheap:.4f}, full alone {result.full:.4f}, routed {result.routed:.4f}")
    print(f"at most {result.share:.0%} of the full network's FLOPs\n{result.summary}")
