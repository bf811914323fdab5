"""How `bigvision process` scales over worker processes: one thread each, the same scene and network.

    python benchmarks/scaling.py [--size 2048] [--workers 1 2] [--repeats 3]

A worker is started and its network built before the clock runs: what is timed is the work on the units.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from raster import MODEL, SCALE, make_scene
from rich.console import Console
from rich.table import Table

from bigvision.jobs.process import Options
from bigvision.jobs.process.cluster import open_client
from bigvision.jobs.process.run import Watcher, run_scene

CORES = sorted(os.sched_getaffinity(0))


class Clock(Watcher):
    """Seconds from the first finished unit to the last, and the part of the scene that they are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def computed(self, pixels: float) -> None:
        """A unit is stored."""
        self.times.append(time.perf_counter())

    def rate(self, workers: int) -> float:
        """Units a second, once every worker has its network."""
        warm = self.times[workers - 1 :]
        return (len(warm) - 1) / (warm[-1] - warm[0])


def measure(scene: Path, out: Path, workers: int, tile: int) -> float:
    os.sched_setaffinity(0, CORES[:workers])  # a core each, which workers inherit; and so one thread each
    options = Options(
        model=MODEL, scale=SCALE, dtype="float32", tile=tile, memory="8GiB", workers=workers, overwrite=True
    )
    clock = Clock()
    with open_client(options) as client:
        run_scene(
            (str(scene),), out / f"{workers}-{time.time_ns()}.tif", options, client=client, watcher=clock
        )
    return clock.rate(workers) * tile * tile / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = Table(
        title=f"{options.size} x {options.size} x 4, Unet resnet18, float32, tiles of {options.tile} px"
    )
    for column in ("workers", "Mpx/s (median)", "against one"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "scene.tif"
        make_scene(scene, options.size)
        rates = {
            workers: statistics.median(
                measure(scene, Path(folder), workers, options.tile) for _ in range(options.repeats)
            )
            for workers in options.workers
        }
    first = rates[options.workers[0]]
    for workers, rate in rates.items():
        table.add_row(str(workers), f"{rate:.3f}", f"{rate / first:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
