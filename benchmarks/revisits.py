"""What temporal reuse gives on real revisits: trained vegetation trees, on NAIP dates that share a grid.

    python benchmarks/revisits.py revisits/

For each pair the trees of `examples/vegetation.py` are trained on the four other dates. Both dates enter
divided by their own mean brightness, so that what differs is not the exposure. Regions of the later one whose
input changed by no more than the tolerance are copied from the earlier result; what that costs is told
against computing everything, and against the vegetation that near infrared shows.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from vegetation import Settings, colours, train  # noqa: E402
from vegetation_routed import exposure  # noqa: E402
from vegetation_truth import NONE, vegetation_labels  # noqa: E402

from bigvision.models.spec import load_model  # noqa: E402
from bigvision.routing.temporal import TemporalRouter, changed_pixels  # noqa: E402
from tiling import open_raster  # noqa: E402

PAIRS = (("2012", "2015"), ("2017", "2018"))
TOLERANCES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)


def dated(folder: Path, year: str) -> Path:
    """The photograph of a year."""
    (path,) = folder.glob(f"*_{year}*.tif")
    return path


def image(scene: Path) -> torch.Tensor:
    """Red, green and blue over the mean of their sum, [3, H, W]."""
    return torch.from_numpy(colours(scene)) / exposure(scene)


def iou(found: NDArray[np.bool_], labels: NDArray[np.uint8]) -> float:
    """Of a map with the near infrared's, both [H, W], where there is data."""
    known, truth = labels != NONE, labels == 1
    return float((found & truth & known).sum() / ((found | truth) & known).sum())


def pair(folder: Path, years: tuple[str, str], region: int, settings: Settings, out: Path) -> None:
    """One curve."""
    before, later = (dated(folder, year) for year in years)
    others = [path for path in sorted(folder.glob("*.tif")) if path not in (before, later)]
    weights = out / f"{'_'.join(years)}.safetensors"
    train(others, settings, weights)
    router = TemporalRouter(
        load_model(settings.model(1.0), weights, trust=False).eval(), 3, region, made_by="trees"
    )
    visit, now = router(image(before)).visit, image(later)
    exact = router(now).visit.output[0].numpy() > 0
    labels = vegetation_labels(open_raster(later).read())
    differ = float(changed_pixels(now, visit.image, 0.0).float().mean())
    print(f"\n{' -> '.join(years)}: {differ:.1%} of the pixels differ")
    print(f"all computed: IoU {iou(exact, labels):.4f}")
    print("tolerance  recomputed  classes that differ     IoU", flush=True)
    for tolerance in TOLERANCES:
        revisit = router(now, visit, tolerance=tolerance)
        found = revisit.visit.output[0].numpy() > 0
        wrong = float((found != exact)[labels != NONE].mean())
        share, agreement = 1 - revisit.reused, iou(found, labels)
        print(f"{tolerance:9.1f} {share:11.0%} {wrong:20.2%} {agreement:7.4f}", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    """Print both curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for weights")
    parser.add_argument("--naip", type=Path, default=ROOT.parent / "shared" / "data" / "rasters" / "naip")
    parser.add_argument("--region", type=int, default=64)
    parser.add_argument("--trees", type=int, default=Settings().trees)
    args = parser.parse_args(given)
    for years in PAIRS:
        pair(args.naip, years, args.region, Settings(trees=args.trees), args.out)


if __name__ == "__main__":
    main()
