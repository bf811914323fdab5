"""One unit from its pixels to the store: read, computed, converted, written, marked as done."""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigvision.jobs.process.engine import Engine
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from bigvision.jobs.process.results import ResultKind
from tiling import Tile, ZarrWriter

Read = tuple[NDArray[np.float32], NDArray[np.bool_]]


class UnitRunner:
    """What `map_tiles` calls with a scene's pixels and a unit; it stores the result itself.

    Picklable: a process builds its own network, once. Several threads may call it: they read and write, while
    one thread of its own computes, so that all three overlap and the kernels have one pool of threads.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        engine: Engine,
        kind: ResultKind,
        writer: ZarrWriter,
        ledger: Ledger,
        threads: int | None = None,
    ) -> None:
        self.spec, self.engine, self.kind = spec, engine, kind
        self.writer, self.ledger, self.threads = writer, ledger, threads

        self.thread = _own_thread()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("network", "thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.thread = _own_thread()

    @cached_property
    def network(self) -> Network:
        """This process's own."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_network(self.spec)

    def __call__(self, read: Read, unit: Tile) -> None:
        """Compute and store `unit` from what its padded window holds."""
        pixels, valid = read
        shown = valid[unit.crop]
        if shown.any():
            result = self.thread.submit(self._compute, pixels, unit).result()
        else:
            result = np.zeros((self.kind.bands, *unit.shape), self.kind.dtype)
        self.writer.write(self.kind.blank(result, shown), unit.core)
        self.ledger.mark(unit.index)

    def _compute(self, pixels: NDArray[np.float32], unit: Tile) -> NDArray[Any]:
        result = np.empty((self.kind.bands, *unit.shape), self.kind.dtype)
        with torch.inference_mode():
            for window, logits in self.engine.pieces(self.network, unit, pixels):
                top, left = window.row_off - unit.core.row_off, window.col_off - unit.core.col_off
                rows, columns = slice(top, top + window.height), slice(left, left + window.width)
                result[:, rows, columns] = self.kind.convert(logits).cpu().numpy()
        return result


def _own_thread() -> ThreadPoolExecutor:
    """The one that computes."""
    return ThreadPoolExecutor(1, thread_name_prefix="network")
