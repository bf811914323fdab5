"""How a scene is cut for a network: tile, halo, alignment, and the memory that takes.

Legend: C bands, B bands written, H and W rows and columns of the scene; core and halo in pixels.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from rasterio.windows import Window
from torch import nn

from bigvision.graph.geometry import padded_size
from bigvision.jobs.process.engine import Engine, FinerTilesEngine, TilesEngine
from bigvision.jobs.process.geometry import Analysis
from bigvision.jobs.process.memory import (
    TilesForecast,
    base_bytes,
    coordinator_bytes,
    gib,
    refused,
    row_bytes,
)
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.phases import PhasedEngine, PhaseStore
from bigvision.jobs.process.precision import Precision
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.stream import StreamEngine, program_of
from bigvision.streaming.checkpoints import BudgetError, Scratch
from bigvision.streaming.forecast import Beside, forward_rows
from bigvision.streaming.spill import scratch_bytes
from tiling import Tile, TileGrid, ZarrWriter
from tiling.grid import padded_window
from tiling.memory import CACHE_BYTES

_STRIP_BYTES = 32 * 2**20  # of a streamed result that is stored at once
_BAND = 8192  # rows of a streamed band: what a kill can cost against what its halo costs
CORES = (4096, 3584, 3072, 2560, 2048, 1536, 1024, 768, 512, 384, 256, 128, 64, 32)


@dataclass(frozen=True)
class Plan:
    """The cut of one scene, stored with its run so that a resumed one cuts alike.

    engine: "tiles" or "stream". tile: side of a core, or rows of a streamed band. stride, halo: alignment of
    padded windows and context around cores. exactness: "exact", or "approximate: ..." with the reasons.
    dtype: of the network; agreement: the part of classes on which bfloat16 agreed with float32 (None: not
    compared). predicted_bytes: peak of all `processes` that compute. step: rows of the scene that a streamed
    band advances by. phases: passes that take statistics over the scene, band by band, before the output is
    computed; None where a band needs nothing but itself and its halo. scratch: bytes of values that passes
    keep beside the result for later ones. inner: side of the smaller cores that a tile is computed in where
    the run goes on with less memory than it was cut for; 0: it is computed whole.
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
    step: int = 0
    phases: int | None = None
    scratch: int = 0
    inner: int = 0

    def units(self, shape: tuple[int, int, int], frame: Window, writer: ZarrWriter) -> list[Tile]:
        """What is computed of a frame of a scene [C, H, W]: squares, or bands of rows as wide as the frame.

        Their padded windows reach beyond the frame, as far as the scene goes, and begin where those of the
        whole scene do.
        """
        cores = writer.grid(self.tile if self.engine == "tiles" else (self.tile, frame.width))
        return [self._unit(tile, shape, frame) for tile in cores]

    def _unit(self, tile: Tile, shape: tuple[int, int, int], frame: Window) -> Tile:
        left, top = tile.core.col_off + frame.col_off, tile.core.row_off + frame.row_off
        core = Window(left, top, tile.core.width, tile.core.height)
        return Tile(tile.index, core, padded_window(core, shape[1:], self.halo, self.stride))

    def bands(self, shape: tuple[int, int, int], writer: ZarrWriter) -> TileGrid:
        """The bands of a whole scene [C, H, W] that passes for statistics sum."""
        rows = -(-self.tile // writer.shard[0]) * writer.shard[0]
        return TileGrid(shape[1], shape[2], (rows, shape[2]), 0, (self.stride, 1))

    def shard(self, shape: tuple[int, int, int], kind: ResultKind) -> tuple[int, int, int]:
        """Rows and columns that the store keeps in one file, and the side of its chunks."""
        if self.engine == "tiles":
            return self.tile, self.tile, _chunk(self.tile)
        rows = min(_strip_rows(shape[2], kind), self.tile)
        return rows, shape[2], rows

    def runs(self, sums: PhaseStore, rows: Path, size: tuple[int, int]) -> Engine:
        """The engine as planned for a scene of `size` (H, W); its passes keep statistics and values there."""
        if self.engine == "tiles":
            finer = FinerTilesEngine(size, self.inner, self.halo, self.stride)
            return finer if self.inner else TilesEngine(self.stride)
        if self.phases is None:
            return StreamEngine(self.step, self.stride, self.halo)
        scratch = Scratch(rows, self.scratch) if self.scratch else None
        return PhasedEngine(self.step, self.stride, self.phases, sums, scratch)

    def reusing(self, rule: str) -> "Plan":
        """The same where parts of the result are by `rule` those of an earlier one."""
        before = "approximate: " if self.exactness == "exact" else f"{self.exactness}; "
        return replace(self, exactness=before + rule)

    @property
    def cut(self) -> str:
        """How the scene is cut and how much of it is read more than once, in words."""
        if self.engine == "tiles":
            return f"tiles of {self.tile} px with a halo of {self.halo} px"
        bands = f"streamed bands of {self.tile} rows"
        if self.phases is None:
            return f"{bands} with a halo of {self.halo} px"
        if not self.phases:
            return bands
        kept = f", {gib(self.scratch)} kept between them" if self.scratch else ""
        return f"{bands}, {1 + self.phases} passes for the scene's statistics{kept}"

    def record(self) -> dict[str, Any]:
        """For JSON; `plan_of` is the way back."""
        return asdict(self)


def plan_of(record: Any) -> Plan:
    """What `Plan.record` gave; ValueError where it is something else."""
    kinds = get_type_hints(Plan)
    if not isinstance(record, dict) or set(record) != set(kinds):
        raise ValueError("the plan has other entries than this version writes")
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise ValueError(f"the plan's {name} can't be {value!r}")
    return Plan(**record)


def _strip_rows(width: int, kind: ResultKind) -> int:
    """Rows of a streamed result that are stored at once."""
    rows = _STRIP_BYTES // (width * _pixel_bytes(kind))
    return min(512, max(64, rows // 64 * 64))


def _pixel_bytes(kind: ResultKind) -> int:
    """Of the result."""
    return kind.bands * np.dtype(kind.dtype).itemsize


def plan_scene(
    shape: tuple[int, int, int],
    pixels: np.dtype[Any],
    kind: ResultKind,
    analysis: Analysis,
    options: Options,
    precision: Precision,
    model: nn.Module,
    disk: int,
    frame: Window | None = None,
) -> Plan:
    """Choose the engine and the cut of a scene, or of a frame of it.

    ValueError where nothing exact can be cut, or nothing fits `--memory`.

    pixels: the type that the scene is stored in.

    Of the `disk` bytes that are free where the result goes, passes of a stream may keep values in half.

    `auto` streams whatever can be traced, since bands repeat less of their neighbours than tiles do;
    `--tile` and `--halo` are words about tiles, and ask for them.
    """
    frame = frame or Window(0, 0, shape[2], shape[1])
    tiled = options.tile or options.halo is not None or analysis.source != "graph"
    if options.engine == "stream" or (options.engine == "auto" and not tiled):
        return plan_stream(shape, pixels, kind, analysis, options, precision, model, disk, frame)
    return _plan_tiles(shape, pixels, kind, analysis, options, precision, frame)


def plan_stream(
    shape: tuple[int, int, int],
    pixels: np.dtype[Any],
    kind: ResultKind,
    analysis: Analysis,
    options: Options,
    precision: Precision,
    model: nn.Module,
    disk: int,
    frame: Window,
) -> Plan:
    """The cut of a scene into streamed bands; arguments and errors as of `plan_scene`."""
    if analysis.source != "graph":
        raise ValueError("--engine stream needs a network that can be traced; --engine tiles does not")
    whole = padded_size(frame.height, frame.width, analysis.stride)[0]
    processes = options.workers or 1
    # Rows that depend on the whole scene are bands of its stream, which need no halo.
    halo = 0 if analysis.inexact else analysis.halo
    band = options.tile or min(_BAND, -(-whole // processes))
    band = min(-(-band // analysis.stride) * analysis.stride, whole)
    each = (options.memory_bytes - coordinator_bytes(options)) // processes
    # A strip is made, written and compressed at once; a step's logits stand there as computed and in float32.
    strips = 4 * _strip_rows(frame.width, kind) * frame.width * _pixel_bytes(kind)
    fixed = (
        base_bytes(options) + CACHE_BYTES + 2 * analysis.parameter_bytes + strips + shape[1] * shape[2] // 8
    )
    tall = padded_size(shape[1], shape[2], analysis.stride)[0]
    tall = tall if analysis.inexact else min(tall, band + 2 * halo)
    wide = shape[2] if analysis.inexact else padded_window(frame, shape[1:], halo, analysis.stride).width
    limit = min(options.scratch_bytes, disk // 2)
    program, stride = program_of(model, (shape[0], tall, wide), precision.dtype, limit)
    dtype = getattr(torch, precision.dtype)
    row = row_bytes(shape[0], wide, pixels) + 8 * wide * kind.channels
    try:
        rows, needed = forward_rows(program, stride, dtype, Beside(fixed, row), each)
    except BudgetError as error:
        raise refused(options, f"streaming {wide} columns", error.least) from error
    return Plan(
        engine="stream",
        tile=band,
        stride=analysis.stride,
        halo=halo,
        exactness="exact",
        dtype=precision.dtype,
        agreement=precision.agreement,
        predicted_bytes=needed * processes + coordinator_bytes(options),
        processes=processes,
        step=rows,
        phases=len(program.passes) - 1 if analysis.inexact else None,
        scratch=scratch_bytes(program, dtype),
    )


def _plan_tiles(
    shape: tuple[int, int, int],
    pixels: np.dtype[Any],
    kind: ResultKind,
    analysis: Analysis,
    options: Options,
    precision: Precision,
    frame: Window,
) -> Plan:
    processes = options.workers or 1
    each = (options.memory_bytes - coordinator_bytes(options)) // processes
    forecast = TilesForecast(shape, pixels, kind, analysis, precision.dtype, base_bytes(options))
    halo, exactness = _halo(analysis, options)
    # A halo or core as large as the scene is the whole scene, however large it was asked for.
    whole = max(padded_size(shape[1], shape[2], analysis.stride))
    halo = min(halo, whole)
    if analysis.inexact and options.halo is None:
        framed = (frame.height, frame.width) != shape[1:]
        tile, halo, exactness = whole, whole if framed else 0, "exact"
        if forecast(tile, halo) > each:
            raise ValueError(
                f"tiles can't equal the whole image: {'; '.join(analysis.inexact)}. Run whole, the scene "
                f"takes {gib(forecast(tile, halo))}, --memory allows {gib(each)}; "
                "--halo N accepts an approximation"
            )
    else:
        tile = min(options.tile or 0, whole)
        tile = tile or _best_core(frame, analysis.stride, halo, each, forecast, options)
    predicted = forecast(tile, halo) * processes + coordinator_bytes(options)
    if predicted > options.memory_bytes:
        raise refused(options, f"a tile of {tile} px with a halo of {halo} px", forecast(tile, halo))
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


def _best_core(
    frame: Window, stride: int, halo: int, budget: int, forecast: TilesForecast, options: Options
) -> int:
    """The core with which the work is done first among those that fit; of equals the smallest."""
    fitting = [core for core in CORES if forecast(core, halo) <= budget]
    if not fitting:
        raise refused(options, f"the smallest tile with a halo of {halo} px", forecast(CORES[-1], halo))
    processes = options.workers or 1

    def computed(core: int) -> float:
        """Pixels computed by the busiest process, of which there are as many as ask for work."""
        grid = TileGrid(frame.height, frame.width, core, halo, stride)
        return grid.overhead * -(-len(grid) // processes) / len(grid)

    return min(sorted(fitting), key=computed)


def _chunk(tile: int) -> int:
    """The largest divisor of the tile up to 512, unless that is tiny."""
    divisors = [tile // parts for parts in range(1, tile + 1) if tile % parts == 0 and tile // parts <= 512]
    return divisors[0] if divisors[0] >= 128 or tile <= 512 else tile
