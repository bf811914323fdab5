"""How a scene is cut for a network: tile, halo, alignment, and the memory that takes.

Legend: C bands, B bands written, H and W rows and columns of the scene; core and halo in pixels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bigvision.graph.geometry import padded_size
from bigvision.jobs.process.geometry import Analysis
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.precision import Precision
from bigvision.jobs.process.results import ResultKind
from tiling import TileGrid
from tiling.memory import CACHE_BYTES

UNITS_AT_ONCE = 3  # one is read, one computed, one written
_CORES = (4096, 3584, 3072, 2560, 2048, 1536, 1024, 768, 512, 384, 256, 128, 64, 32)
# Resident in a process that has loaded torch (its CUDA build alone 650 MiB) and a network. A constant, not a
# measurement, so that one command always cuts alike.
_BASE = 1000 * 2**20
_SCRATCH = 1.4  # kernels' scratch and the heap's fragments, on top of the results themselves (measured)


@dataclass(frozen=True)
class Plan:
    """The cut of one scene, stored with its run so that a resumed one cuts alike.

    tile: side of a core. stride, halo: alignment of padded windows and context around cores.
    exactness: "exact", or "approximate: ..." with the reasons. dtype: of the network; agreement: the part of
    classes on which bfloat16 agreed with float32 (None: not compared). predicted_bytes: peak of all
    `processes` that compute.
    """

    engine: str
    tile: int
    stride: int
    halo: int
    exactness: str
    dtype: str
    agreement: float | None
    predicted_bytes: int
    processes: int

    def record(self) -> dict[str, Any]:
        """For JSON; `Plan(**record)` is the way back."""
        return asdict(self)


def plan_tiles(
    shape: tuple[int, int, int],
    kind: ResultKind,
    analysis: Analysis,
    options: Options,
    precision: Precision,
) -> Plan:
    """Choose the tile; ValueError where nothing exact can be cut, or nothing fits `--memory`."""
    processes = options.workers or 1
    each = (options.memory_bytes - _coordinator(processes)) // processes
    forecast = _Forecast(shape, kind, analysis, precision.dtype)
    halo, exactness = _halo(analysis, options)
    whole = max(padded_size(shape[1], shape[2], analysis.stride))
    if analysis.inexact and options.halo is None:
        tile, halo, exactness = whole, 0, "exact"
        if forecast(tile, halo) > each:
            raise ValueError(
                f"tiles can't equal the whole image: {'; '.join(analysis.inexact)}. Run whole, the scene "
                f"takes {_gib(forecast(tile, halo))}, --memory allows {_gib(each)}; "
                "--halo N accepts an approximation"
            )
    else:
        tile = options.tile or _best_core(shape, analysis.stride, halo, each, forecast)
    predicted = forecast(tile, halo) * processes + _coordinator(processes)
    if predicted > options.memory_bytes:
        raise ValueError(
            f"a tile of {tile} px with a halo of {halo} px takes about {_gib(predicted)} in {processes} "
            f"process(es), --memory allows {_gib(options.memory_bytes)}"
        )
    return Plan(
        engine="tiles",
        tile=tile,
        stride=analysis.stride,
        halo=halo,
        exactness=exactness,
        dtype=precision.dtype,
        agreement=precision.agreement,
        predicted_bytes=predicted,
        processes=processes,
    )


class _Forecast:
    """Peak bytes of one process by tile and halo."""

    def __init__(self, shape: tuple[int, int, int], kind: ResultKind, analysis: Analysis, dtype: str) -> None:
        self.shape, self.stride = shape, analysis.stride
        half = 0.5 if dtype == "bfloat16" else 1.0
        self.fixed = _BASE + CACHE_BYTES + 2 * analysis.parameter_bytes
        # A unit's pixels stand there as read, masked and normalised; its results as logits and converted.
        self.padded = analysis.bytes_per_pixel * _SCRATCH * half + UNITS_AT_ONCE * shape[0] * 12
        written = kind.bands * np.dtype(kind.dtype).itemsize
        self.core = 2 * kind.channels * 4 + UNITS_AT_ONCE * 2 * written

    def __call__(self, tile: int, halo: int) -> int:
        sides = padded_size(self.shape[1], self.shape[2], self.stride)
        padded = [min(side, tile + 2 * halo + 2 * (self.stride - 1)) for side in sides]
        core = [min(side, tile) for side in sides]
        return int(self.fixed + padded[0] * padded[1] * self.padded + core[0] * core[1] * self.core)


def _halo(analysis: Analysis, options: Options) -> tuple[int, str]:
    """The halo in whole strides, and whether it makes tiles equal the whole image."""
    if options.halo is None:
        return analysis.halo, "exact"
    halo = -(-options.halo // analysis.stride) * analysis.stride
    if analysis.inexact:
        return halo, f"approximate: halo {halo} px; {'; '.join(analysis.inexact)}"
    if halo < analysis.halo:
        return halo, f"approximate: halo {halo} px, exact would be {analysis.halo} px"
    return halo, "exact"


def _best_core(shape: tuple[int, int, int], stride: int, halo: int, budget: int, forecast: _Forecast) -> int:
    """The core with the least pixels to compute among those that fit; of equals the smallest."""
    fitting = [core for core in _CORES if forecast(core, halo) <= budget]
    if not fitting:
        raise ValueError(
            f"the smallest tile takes about {_gib(forecast(_CORES[-1], halo))} for each process "
            f"(halo {halo} px), --memory allows {_gib(budget)}"
        )

    def computed(core: int) -> float:
        return TileGrid(shape[1], shape[2], core, halo, stride).overhead

    return min(sorted(fitting), key=computed)


def _coordinator(processes: int) -> int:
    """Bytes of the process that hands out work to others, where there is one."""
    return _BASE if processes > 1 else 0


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
