"""Vegetation from colour at half the compute: a narrow network, and the full one where a gate wants it.

Photographs, labels and full network are those of `vegetation.py`; the cheap network is the same with fewer
channels. Both and a gate are trained together by `bigvision train --route`, and the newest photograph is
processed by each network alone, routed by the learned gate, and routed by the cheap network's entropy.

    python examples/vegetation_routed.py routed/ ../shared/data/rasters/naip/*.tif
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vegetation import COLOURS, MODEL, Training, by_date, compare, statistics, write_pair

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.route_forecast import forecast_route
from bigvision.jobs.train_raster import train
from bigvision.routing.route_file import RouteSpec, load_route, write_route

CHEAP = f"{Path(__file__).with_name('vegetation_network.py')}:texture?width=12"
REGION, BUDGET = 32, 0.24  # with the cheap network everywhere, just under half of the arithmetic


@dataclass(frozen=True)
class Routed:
    """IoU on the newest date by way of computing it; share: FLOPs of a routed one over the full one's."""

    iou: dict[str, float]
    share: float
    summary: dict[str, str]


def routed_vegetation(scenes: Sequence[Path], out: Path, training: Training | None = None) -> Routed:
    """Train the route on all dates but the newest, and process that one; ValueError as `vegetation`."""
    *older, newest = by_date(scenes)
    settings = training or Training()
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.csv").write_text("scene,labels\n" + "".join(write_pair(scene, out) for scene in older))
    write_route(
        RouteSpec(CHEAP, region=REGION, gate="learned", budget=BUDGET), out / "ROUTE.toml", folder=out
    )
    run = train(out / "pairs.csv", out / "run", replace(settings.options(), route=out / "ROUTE.toml")).folder
    mean, std = statistics(newest)
    full = Options(
        MODEL, weights=run / "weights.safetensors", bands=COLOURS, mean=mean, std=std, dtype="float32",
        overwrite=True,
    )  # fmt: skip
    learned = load_route(run / "ROUTE.toml")
    write_route(replace(learned, gate="entropy", gate_weights=None), run / "ENTROPY.toml", folder=run)
    jobs = {
        "cheap": replace(full, model=CHEAP, weights=learned.weights),
        "full": full,
        "learned": replace(full, route=run / "ROUTE.toml"),
        "entropy": replace(full, route=run / "ENTROPY.toml"),
    }
    found, summary = {}, {}
    for name, job in jobs.items():
        target = out / name / newest.name
        target.parent.mkdir(exist_ok=True)
        summary[name] = run_scene((str(newest),), target, job).routed
        found[name] = compare(newest, target, out / f"{name}.png").iou
    share = max(plan.share for plan in forecast_route(str(newest), jobs["learned"]))
    return Routed(found, share, summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for labels, run and results")
    parser.add_argument("scenes", type=Path, nargs="+", help="four-band GeoTIFFs with dates in their names")
    given = parser.parse_args()
    result = routed_vegetation(given.scenes, given.out)
    for name, iou in result.iou.items():
        print(f"{name:8s} IoU {iou:.4f}  {result.summary[name]}")
    print(f"routed: at most {result.share:.0%} of the full network's FLOPs")
