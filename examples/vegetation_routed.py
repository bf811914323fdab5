"""Vegetation from colour at half the compute: a few trees, and all of them where those few are unsure.

Photographs, labels and full network are those of `vegetation.py`; the cheap network has a tenth of the trees
and windows of up to 15 pixels. The newest photograph is processed by each alone, and routed by the cheap
one's entropy.

    python examples/vegetation_routed.py routed/ ../shared/data/rasters/naip/*.tif
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vegetation import Settings, colours, processing, train
from vegetation_truth import by_date, compare

from bigvision.jobs.process.route_forecast import forecast_route
from bigvision.jobs.process.run import run_scene
from bigvision.routing.route_file import RouteSpec, write_route

CHEAP = Settings(trees=12, windows=3, rate=0.25)
REGION, BUDGET = 32, 0.38  # pixels; a share that leaves just under half of the arithmetic


@dataclass(frozen=True)
class Routed:
    """IoU on the newest date and seconds by way of computing it.

    share: the most FLOPs that the routed way takes, over the full one's. summary: where regions went.
    """

    iou: dict[str, float]
    seconds: dict[str, float]
    share: float
    summary: str


def exposure(scene: Path) -> float:
    """The mean of red + green + blue where there is data.

    A network can find it by itself, but a routed one computes windows and must be told what is of the whole.
    """
    total = colours(scene).sum(0, dtype="float64")
    return float(total[total > 0].mean())


def routed_vegetation(
    scenes: Sequence[Path],
    out: Path,
    full: Settings | None = None,
    cheap: Settings = CHEAP,
    region: int = REGION,
    budget: float = BUDGET,
) -> Routed:
    """Train both networks on all dates but the newest, and process that one; ValueError as `vegetation`."""
    *older, newest = by_date(scenes)
    light, jobs = exposure(newest), {}
    for name, settings in (("cheap", cheap), ("full", full or Settings())):
        train(older, settings, out / f"{name}.safetensors")
        jobs[name] = processing(settings.model(light), out / f"{name}.safetensors")
    route = RouteSpec(jobs["cheap"].model, jobs["cheap"].weights, region, "entropy", budget)
    write_route(route, out / "ROUTE.toml", folder=out)
    jobs["routed"] = replace(jobs["full"], route=out / "ROUTE.toml")
    forecast = forecast_route(str(newest), jobs["routed"])
    share = max(forecast.compact.share, forecast.scattered.share)
    iou, seconds, summary = {}, {}, ""
    for name, job in jobs.items():
        target = out / name / newest.name
        target.parent.mkdir(exist_ok=True)
        outcome = run_scene((str(newest),), target, job)
        seconds[name], summary = outcome.seconds, outcome.routed
        iou[name] = compare(newest, target, out / f"{name}.png").iou
    return Routed(iou, seconds, share, summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for weights, route and results")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result = routed_vegetation(given.scenes, given.out)
    for name, iou in result.iou.items():
        print(f"{name:6s} IoU {iou:.4f}  {result.seconds[name]:.1f} s")
    print(f"{result.summary}\nrouted: at most {result.share:.1%} of the full network's FLOPs")
