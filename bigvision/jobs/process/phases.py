"""Statistics over a whole scene, band by band: each band's sums in the ledger, reduced from top to bottom.

A network with global pooling or normalisation needs several passes over the scene. Each pass is divided into
the same bands as the output; what a killed job had summed is not summed again, and the bytes of the result
depend on the cut alone, not on who computed what when.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from safetensors.torch import load_file
from torch import Tensor

from bigvision.jobs.process.engine import Piece, View
from bigvision.jobs.process.following import Progress
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.stream import SceneRows, cut_rows, streamed_model
from bigvision.jobs.process.units import Stop, Work
from bigvision.streaming.bands import BandedStream, OnStep, PhaseSums
from bigvision.streaming.checkpoints import Scratch
from bigvision.streaming.memory import freed_memory_kept
from bigvision.tensors import save_tensors
from tiling import Tile
from tiling.publish import flush, publish, staging_name

_ROWS = "rows.json"


@dataclass(frozen=True)
class PhaseStore:
    """The sums of all bands and phases of one run, in files; picklable.

    folder: where they are. bands: of the scene.
    """

    folder: Path
    bands: int

    def done(self, phase: int) -> frozenset[int]:
        """The bands whose sums are there."""
        complete = self._phase(phase).glob("*.safetensors")
        return frozenset(int(path.stem) for path in complete if path.stem.isdecimal())

    def save(self, phase: int, band: int, sums: PhaseSums) -> None:
        """Keep one band's sums."""
        path = self._phase(phase) / f"{band}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = staging_name(path)
        flat = {f"{name} {place}": part for name, parts in sums.items() for place, part in enumerate(parts)}
        save_tensors(flat, staging)
        publish(staging, path)

    def load(self, phase: int, device: str) -> list[PhaseSums]:
        """All bands' sums, from top to bottom; FileNotFoundError where one is missing."""
        return [_read(self._phase(phase) / f"{band}.safetensors", device) for band in range(self.bands)]

    def keep(self, rows: Path) -> None:
        """Flush the values that bands so far left in the folder `rows`, and note how many bytes they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {}
        for file in rows.glob("*.rows"):
            flush(file)
            sizes[file.name] = file.stat().st_size
        staging = staging_name(self.folder / _ROWS)
        staging.write_text(json.dumps(sizes), encoding="utf-8")
        publish(staging, self.folder / _ROWS)

    def check(self, rows: Path) -> bool:
        """Whether all is there that was kept; where it is not, what can't be trusted is removed."""
        try:
            noted = json.loads((self.folder / _ROWS).read_bytes()) if (self.folder / _ROWS).exists() else {}
            whole = all((rows / name).stat().st_size >= size for name, size in noted.items())
        except (OSError, ValueError, TypeError, AttributeError):
            whole = False
        if not whole:
            for folder in (self.folder, rows):
                shutil.rmtree(folder, ignore_errors=True)
            return False
        for path in self.folder.rglob("*.safetensors"):
            try:
                _read(path, "cpu")
            except Exception:  # of whatever kind: it is no file of sums any more
                path.unlink()
                whole = False
        return whole

    def _phase(self, phase: int) -> Path:
        return self.folder / f"phase-{phase}"


def _read(path: Path, device: str) -> PhaseSums:
    sums: dict[str, dict[int, Tensor]] = {}
    for key, part in load_file(path, device).items():
        name, place = key.rsplit(" ", 1)
        sums.setdefault(name, {})[int(place)] = part
    return {name: tuple(parts[place] for place in sorted(parts)) for name, parts in sums.items()}


@dataclass(frozen=True)
class PhasedEngine:
    """Bands of the whole scene's stream: exact whatever the network, at no halo but each operator's own.

    rows: image rows a step. stride: alignment of bands. phases: passes that take statistics. store: their
    sums. scratch: where they keep values that later ones start from, if they do.
    """

    rows: int
    stride: int
    phases: int
    store: PhaseStore
    scratch: Scratch | None = None
    at_once: int = 1  # a unit overlaps its own reading, computing and writing

    def read(self, scene: View, unit: Tile) -> View:
        """The scene itself, which is read by rows while they are computed."""
        return scene

    def below(self, unit: Tile, rows: int) -> Tile:
        """A shorter band; of it a step is computed, and not kept, before the first step that is whole."""
        core = cut_rows(unit.core, rows)
        above = max(0, rows - self.rows - self.stride) // self.stride * self.stride
        return Tile(unit.index, core, cut_rows(unit.padded, above))

    def take(self, network: Network, unit: Tile, scene: View, phase: int, on_step: OnStep) -> None:
        """One band's sums of one phase, into the store; those of all earlier phases must be there."""
        with self._stream(network, scene) as (stream, _):
            sums = stream.sums(phase, _band(stream, unit.core), self._before(stream, phase), on_step)
        if self.scratch is not None:
            self.store.keep(self.scratch.folder)
        self.store.save(phase, unit.index, sums)

    def forget(self, spec: NetworkSpec, scene: Scene, phase: int) -> None:
        """All bands of a phase are done: delete what no later one starts from."""
        if self.scratch is not None:
            with self._stream(load_network(spec), scene) as (stream, _):
                stream.forget(phase)
            self.store.keep(self.scratch.folder)

    def pieces(self, network: Network, unit: Tile, read: View) -> Iterator[Piece]:
        """Rows of the core as they leave the network."""
        core = unit.core
        with self._stream(network, read) as (stream, source):
            for row, logits in stream.rows(_band(stream, unit.padded), self._before(stream, self.phases)):
                start = max(row, core.row_off)
                stop = min(row + logits.shape[-2], core.row_off + core.height)
                if start < stop:
                    window = Window(core.col_off, start, core.width, stop - start)
                    columns = slice(core.col_off, core.col_off + core.width)
                    kept = logits[0, :, start - row : stop - row, columns]
                    yield Piece(window, kept, source.valid(start, stop)[:, columns] & read.inside(window))

    @contextmanager
    def _stream(self, network: Network, scene: View) -> Iterator[tuple[BandedStream, SceneRows]]:
        _, height, width = scene.shape
        with SceneRows(scene, Window(0, 0, width, height)) as source:
            model = streamed_model(network, scene.shape, self.rows, self.scratch)
            yield BandedStream(model, source), source

    def _before(self, stream: BandedStream, phase: int) -> list[PhaseSums]:
        """The whole sums of the phases before this one."""
        device = str(stream.model.device)
        return [stream.merged(self.store.load(earlier, device)) for earlier in range(phase)]


def _band(stream: BandedStream, window: Window) -> tuple[int, int]:
    """The rows of a window; the lowest one takes the padding below the scene, too."""
    stop = window.row_off + window.height
    height, padded = stream.model.shape[1], stream.model.program.traced.shape[1]
    return window.row_off, padded if stop == height else stop


class PhaseRunner:
    """What `map_tiles` calls with a band, in one phase of statistics. Picklable; one band at a time."""

    def __init__(
        self, work: Work, engine: PhasedEngine, phase: int, progress: Progress | None = None
    ) -> None:
        self.work, self.engine, self.phase, self.progress = work, engine, phase, progress
        self.room, self.halt = threading.Lock(), Stop()

    def __reduce__(self) -> tuple[type["PhaseRunner"], tuple[Work, PhasedEngine, int]]:
        return PhaseRunner, (self.work, self.engine, self.phase)

    def __call__(self, _: NDArray[Any], unit: Tile) -> None:
        """Sum one band."""
        with self.room, freed_memory_kept(), torch.inference_mode():
            if self.work.threads is not None:
                torch.set_num_threads(self.work.threads)
            network, known = load_network(self.work.spec), 0

            def on_step(done: float) -> None:
                nonlocal known
                self.halt.check()
                rows = int(done * unit.core.height)
                if self.progress is not None:
                    self.progress((rows - known) * unit.core.width)
                known = rows

            self.engine.take(network, unit, self.work.scene, self.phase, on_step)

    def stop(self) -> None:
        """No more is wanted: a band under way ends with its step."""
        self.halt.set()
