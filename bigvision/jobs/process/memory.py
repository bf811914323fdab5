"""What a command's processes hold beside a stream, or with tiles; and what is said where it is too much.

Legend: C bands, H and W rows and columns of the scene; core and halo in pixels.
"""

from typing import Any

import numpy as np

from bigvision.graph.geometry import padded_size
from bigvision.jobs.process.engine import TilesEngine
from bigvision.jobs.process.geometry import Analysis
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.results import ResultKind
from bigvision.streaming.forecast import COMPILER_BYTES, PROCESS_BYTES, WORKER_BYTES, reading_bytes
from tiling.memory import CACHE_BYTES

_SCRATCH = 1.4  # kernels' scratch and the heap's fragments, on top of the results themselves (measured)


class TilesForecast:
    """Peak bytes of one process by tile and halo."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        pixels: np.dtype[Any],
        kind: ResultKind,
        analysis: Analysis,
        dtype: str,
        base: int,
    ) -> None:
        self.shape, self.stride = shape, analysis.stride
        half = 0.5 if dtype == "bfloat16" else 1.0
        self.fixed = base + CACHE_BYTES + 2 * analysis.parameter_bytes
        # A unit's pixels stand there as read, masked and normalised; its results as logits and converted.
        self.padded = analysis.bytes_per_pixel * _SCRATCH * half
        self.padded += TilesEngine.at_once * row_bytes(shape[0], 1, pixels)
        written = kind.bands * np.dtype(kind.dtype).itemsize
        self.core = 2 * kind.channels * 4 + TilesEngine.at_once * 2 * written

    def __call__(self, tile: int, halo: int) -> int:
        """Of tiles that are computed whole."""
        sides = padded_size(self.shape[1], self.shape[2], self.stride)
        padded = [min(side, tile + 2 * halo + 2 * (self.stride - 1)) for side in sides]
        core = [min(side, tile) for side in sides]
        return int(self.fixed + padded[0] * padded[1] * self.padded + core[0] * core[1] * self.core)

    def within(self, tile: int, inner: int, halo: int) -> int:
        """The same where a tile is computed in smaller ones, and its pixels wait for the last of them."""
        side = min(tile, max(self.shape[1:]))
        return self(inner, halo) + side * side * self.core


def refused(options: Options, what: str, least: int) -> ValueError:
    """The error for something that takes more than `--memory` in each process; its advice is enough."""
    processes = options.workers or 1
    total = least * processes + coordinator_bytes(options)
    each = f" in each of {processes} processes" if options.workers else ""
    return ValueError(
        f"--memory {options.memory} can't be met: {what} takes {gib(least)}{each}; at least "
        f"--memory {-(-total // 2**20)}MiB is needed"
    )


def row_bytes(channels: int, width: int, pixels: np.dtype[Any]) -> int:
    """Of a row [C, 1, W] of a scene of such pixels on its way into the network."""
    return reading_bytes(channels, width, pixels.itemsize, floating=pixels.kind == "f")


def base_bytes(options: Options) -> int:
    """Bytes of a process that computes, before it does."""
    process = PROCESS_BYTES if options.workers is None else WORKER_BYTES
    return process + COMPILER_BYTES if options.compile else process


def coordinator_bytes(options: Options) -> int:
    """Bytes of the process that hands out work to others, where there is one."""
    return PROCESS_BYTES if options.workers is not None else 0


def gib(size: float) -> str:
    """`1.50 GiB`, `20.0 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
