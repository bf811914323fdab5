"""Speed and memory of a run, as its log and its curves have them."""

import time

import psutil
import torch

from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.curves import Point
from bigvision.jobs.faces.step import Stepped


class Meter:
    """Throughput since the last line, of all ranks."""

    def __init__(self, world: World, batch_size: int) -> None:
        self.world, self.batch_size = world, batch_size
        self.steps, self.since = 0, time.perf_counter()

    def count(self) -> None:
        """Count a step."""
        self.steps += 1

    def point(self, step: int, epoch: float, stepped: Stepped, lr: float, damaged: int) -> Point:
        """The point of a curve that ends here; called on all ranks together."""
        now = time.perf_counter()
        rate = self.steps * self.batch_size / (now - self.since)
        self.steps, self.since = 0, now
        memory = self.world.sum(_memory_mib(self.world.device))
        return Point(step, epoch, stepped.loss, lr, stepped.gradient_norm, rate, memory, damaged)


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def line(point: Point, steps: int, share: float) -> str:
    """A point as a line of the log; `share` of what was read lately was damaged."""
    text = (
        f"step {point.step}/{steps}  epoch {point.epoch:.2f}  loss {point.loss:.4f}  lr {point.lr:.4g}  "
        f"{point.samples_per_second:.1f} samples/s  {point.memory_mib / 1024:.2f} GiB in all ranks"
    )
    if not point.damaged:
        return text
    return f"{text}  {point.damaged:,} damaged records ({100 * share:.3g}% lately)"
