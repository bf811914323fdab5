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

from bigvision.jobs.process.engine import Engine, Piece
from bigvision.jobs.process.following import Progress
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.strips import Strip, strips
from bigvision.streaming.memory import freed_memory_kept
from tiling import Tile, ZarrWriter
from tiling.shards import Stamp, settle


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


class StoppedError(RuntimeError):
    """The job was stopped while a unit was computed."""


class Stop:
    """Asks threads that compute to end, as soon as they look."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def set(self) -> None:
        """Ask."""
        self._asked.set()

    def check(self) -> None:
        """StoppedError if asked."""
        if self._asked.is_set():
            raise StoppedError("the job was stopped")

    def checked(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The same, looking before each."""
        for piece in pieces:
            self.check()
            yield piece


@dataclass(frozen=True)
class Stoppable:
    """A scene that can't be read any more once the job is stopped."""

    scene: Scene
    halt: Stop

    @property
    def shape(self) -> tuple[int, int, int]:
        """The scene's."""
        return self.scene.shape

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """As the scene does; StoppedError once the job is stopped."""
        self.halt.check()
        return self.scene.read(window)

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """As the scene does."""
        return self.scene.inside(window)


class UnitRunner:
    """What `map_tiles` calls with a unit; it stores the result itself.

    Picklable: a process builds its own network, once. Several threads may call it: they read and write, while
    one thread of its own computes, so that all three overlap and the kernels have one pool of threads.
    """

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        self.work, self.progress, self.halt = work, progress, Stop()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.room = threading.BoundedSemaphore(work.engine.at_once)

    def __reduce__(self) -> tuple[type["UnitRunner"], tuple[Work]]:
        return UnitRunner, (self.work,)

    def __call__(self, _: NDArray[Any], unit: Tile) -> None:
        """Compute and store one unit, from where an earlier run or worker left it."""
        engine, log = self.work.engine, self.work.ledger.strips
        with self.room, freed_memory_kept():
            known = log.rows(unit.index)
            last: dict[str, Stamp] = {}
            if known < unit.core.height:
                left = engine.below(unit, known)
                made = self._strips(left, engine.read(Stoppable(self.work.scene, self.halt), left))
                # The network's thread makes strip after strip; this one writes each while the next is made.
                making = self.thread.submit(self._next, made)
                while (strip := making.result()) is not None:
                    making = self.thread.submit(self._next, made)
                    known, last = self._store(unit, known, *strip)
        self.work.ledger.mark(unit.index, last)
        self._tell((unit.core.height - known) * unit.core.width)

    def stop(self) -> None:
        """No more is wanted: units under way end with their step; what is stored of them stays."""
        self.halt.set()

    def _store(
        self, unit: Tile, known: int, pixels: NDArray[Any], window: Window, spoilt: int
    ) -> tuple[int, dict[str, Stamp]]:
        """Rows of the unit that are noted as stored after this strip; its stamps, where the mark has them."""
        place = self.work.scene.framed(window)
        self.work.writer.write(pixels, place)
        stamps = settle(self.work.writer, place)
        done = window.row_off + window.height - unit.core.row_off
        if done < unit.core.height or spoilt:
            self.work.ledger.strips.add(unit.index, done, stamps, spoilt)
        if done == unit.core.height:
            return known, stamps
        self._tell((done - known) * window.width)
        return done, {}

    def _tell(self, pixels: int) -> None:
        if self.progress is not None and pixels:
            self.progress(pixels)

    @cached_property
    def _network(self) -> Network:
        if self.work.threads is not None:
            torch.set_num_threads(self.work.threads)
        return load_network(self.work.spec)

    def _strips(self, unit: Tile, read: Any) -> Iterator[Strip]:
        pieces = self.halt.checked(self.work.engine.pieces(self._network, unit, read))
        yield from strips(pieces, unit.core, self.work.writer.shard[0], self.work.kind)

    def _next(self, made: Iterator[Strip]) -> Strip | None:
        with torch.inference_mode():
            return next(made, None)
