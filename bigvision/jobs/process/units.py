"""One unit from its pixels to the store: read, computed, converted, written, marked as done."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.engine import Engine
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.strips import Strip, strips
from bigvision.streaming.memory import freed_memory_kept
from tiling import Tile, ZarrWriter


class Unread:
    """The source that `map_tiles` asks for pixels: none, because a unit reads what it needs itself."""

    def read(self, window: Window) -> NDArray[Any]:
        """Nothing."""
        return np.empty((0, 0, 0))


@dataclass(frozen=True)
class Work:
    """All that a process needs to compute units; picklable."""

    scene: Scene
    spec: NetworkSpec
    engine: Engine
    kind: ResultKind
    writer: ZarrWriter
    ledger: Ledger
    threads: int | None = None


class UnitRunner:
    """What `map_tiles` calls with a unit; it stores the result itself.

    Picklable: a process builds its own network, once. Several threads may call it: they read and write, while
    one thread of its own computes, so that all three overlap and the kernels have one pool of threads.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.room = threading.BoundedSemaphore(work.engine.at_once)

    def __reduce__(self) -> tuple[type["UnitRunner"], tuple[Work]]:
        return UnitRunner, (self.work,)

    def __call__(self, _: NDArray[Any], unit: Tile) -> None:
        """Compute and store one unit."""
        with self.room, freed_memory_kept():
            made = self._strips(unit, self.work.engine.read(self.work.scene, unit))
            # The network's thread makes strip after strip; this one writes each while the next is made.
            making = self.thread.submit(self._next, made)
            while (strip := making.result()) is not None:
                making = self.thread.submit(self._next, made)
                self.work.writer.write(*strip)
        self.work.ledger.mark(unit.index)

    @cached_property
    def _network(self) -> Network:
        if self.work.threads is not None:
            torch.set_num_threads(self.work.threads)
        return load_network(self.work.spec)

    def _strips(self, unit: Tile, read: Any) -> Iterator[Strip]:
        pieces = self.work.engine.pieces(self._network, unit, read)
        yield from strips(pieces, unit.core, self.work.writer.shard[0], self.work.kind)

    def _next(self, made: Iterator[Strip]) -> Strip | None:
        with torch.inference_mode():
            return next(made, None)
