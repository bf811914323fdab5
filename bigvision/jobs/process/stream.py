"""The engine that streams: a unit is a full-width band of rows.

Legend: C bands, K logits, h and w rows and columns.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import nn

from bigvision.graph.geometry import trace_padded
from bigvision.jobs.process.engine import Piece, View
from bigvision.jobs.process.network import Network
from bigvision.streaming import StreamedModel
from bigvision.streaming.checkpoints import Scratch
from bigvision.streaming.program import Program, compile_program
from bigvision.streaming.spill import spilled
from datasets.pairs import Pixels
from tiling import Tile


@dataclass(frozen=True)
class StreamEngine:
    """Line buffers instead of overlapping tiles: only a band's own halo is computed twice.

    rows: image rows a step. stride, halo: alignment of bands and context above and below them.
    """

    rows: int
    stride: int
    halo: int
    at_once: int = 1  # a unit overlaps its own reading, computing and writing

    def read(self, scene: View, unit: Tile) -> View:
        """The scene itself, which is read by rows while they are computed."""
        return scene

    def below(self, unit: Tile, rows: int) -> Tile:
        """A shorter band, which begins whole steps lower.

        One step more than its halo above: whatever is kept of it is computed in steps that begin and end
        where those of the whole band do, by kernels that see the same shapes.
        """
        core = cut_rows(unit.core, rows)
        step, top = lcm(self.rows, self.stride), unit.padded.row_off
        skipped = max(0, core.row_off - self.halo - self.rows - top) // step * step
        return Tile(unit.index, core, cut_rows(unit.padded, skipped))

    def pieces(self, network: Network, unit: Tile, read: View) -> Iterator[Piece]:
        """Rows of the core as they leave the network."""
        core, padded, columns = unit.core, unit.padded, unit.crop[1]
        model = streamed_model(network, (read.shape[0], padded.height, padded.width), self.rows)
        with SceneRows(read, padded) as source:
            for row, logits in model.stream(source):
                start = max(row, core.row_off - padded.row_off)
                stop = min(row + logits.shape[-2], core.row_off + core.height - padded.row_off)
                if start >= stop:
                    continue
                window = Window(core.col_off, padded.row_off + start, core.width, stop - start)
                shown = source.valid(start, stop)[:, columns] & read.inside(window)
                yield Piece(window, logits[0, :, start - row : stop - row, columns], shown)


def cut_rows(window: Window, rows: int) -> Window:
    """A window without its first rows."""
    return Window(window.col_off, window.row_off + rows, window.width, window.height - rows)


def program_of(
    model: nn.Module, shape: tuple[int, int, int], dtype: str, scratch_limit: int = 0
) -> tuple[Program, int]:
    """(What streams an image [C, H, W], keeping `scratch_limit` bytes between passes; its total stride)."""
    traced, stride = trace_padded(model, shape)
    return spilled(compile_program(traced), getattr(torch, dtype), scratch_limit), stride


@lru_cache(maxsize=4)
def streamed_model(
    network: Network, shape: tuple[int, int, int], rows: int, scratch: Scratch | None = None
) -> StreamedModel:
    """Bands of one height share their schedule."""
    return StreamedModel(
        network.module,
        shape,
        rows=rows,
        scratch=None if scratch is None else (scratch.folder, scratch.limit),
        dtype=network.dtype,
        device=network.device,
        compile=network.compile,
    )


class SceneRows:
    """A window of a scene for `StreamedModel`: sliced by rows, the next ones read ahead.

    Remembers, a bit a pixel, where there was data: rows leave the network long after they were read.
    """

    def __init__(self, scene: Pixels, window: Window) -> None:
        self.scene, self.window = scene, window
        self.shape = (scene.shape[0], window.height, window.width)
        self._seen = np.zeros((window.height, -(-window.width // 8)), np.uint8)
        self._known = np.zeros(window.height, np.bool_)
        self._ahead: tuple[int, int, Future[NDArray[np.float32]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def __enter__(self) -> "SceneRows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """`source[:, a:b]`: float32 [C, b - a, w]."""
        a, b, _ = key[1].indices(self.window.height)
        ahead, self._ahead = self._ahead, None
        rows = ahead[2].result() if ahead is not None and ahead[:2] == (a, b) else self._read(a, b)
        end = min(2 * b - a, self.window.height)
        if b < end:
            self._ahead = (b, end, self._reader.submit(self._read, b, end))
        return rows

    def valid(self, a: int, b: int) -> NDArray[np.bool_]:
        """Where rows a to b have data, bool [b - a, w]; read here where the network did not need them."""
        if not self._known[a:b].all():
            self._read(a, b)
        return np.unpackbits(self._seen[a:b], axis=1, count=self.window.width).astype(bool)

    def _read(self, a: int, b: int) -> NDArray[np.float32]:
        place = Window(self.window.col_off, self.window.row_off + a, self.window.width, b - a)
        pixels, valid = self.scene.read(place)
        self._seen[a:b] = np.packbits(valid, axis=1)
        self._known[a:b] = True
        return pixels
