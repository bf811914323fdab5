"""`--previous RUN`: tiles of a revisit whose input did not change are copied from the earlier result.

A tile is computed in a shape of its own that doesn't depend on its neighbours, so that the result is, bit by
bit, that of computing every tile. `--tolerance` and `--resample-previous` take more, at the price of that:
the result then says by which rule, and no later one may be taken from it, since small changes add up.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.computing import Computation
from bigvision.jobs.process.network import Network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.provenance import TAG, Provenance, provenance, shown_address
from bigvision.jobs.process.revisit import nearly_same, nearly_same_resampled, same_bits
from bigvision.jobs.process.scene import Scene, open_scene
from bigvision.jobs.process.strips import row_windows
from bigvision.routing.grids import GridError, check_same_grid, resampled, under
from tiling import Raster, RasterError, open_raster
from tiling.shards import settle

_ALIKE = ("BIGVISION_VERSION", "BIGVISION_MODEL_SHA256", "BIGVISION_OPTIONS")
_SIDE = 1024  # of the windows that are compared at once


@dataclass(frozen=True)
class Reuse:
    """How tiles are taken from an earlier result where that isn't bit for bit.

    source: that result's fingerprint. shift: how its grid lies to the present one; empty where they are one.
    """

    previous: str
    source: str
    tolerance: float
    shift: str

    @property
    def rule(self) -> str:
        """In words, for the result's metadata."""
        rule = f"tiles whose input differs by at most {self.tolerance:g} are those of {self.previous}"
        return f"{rule}, resampled by nearest neighbours ({self.shift})" if self.shift else rule


@dataclass(frozen=True)
class Previous:
    """An earlier run: what it saw and what it gave. reuse: None where only equal bits will do."""

    scene: Scene
    result: Raster
    reuse: Reuse | None = None

    def same(self, scene: Scene, window: Window) -> bool:
        """Whether what the earlier run saw of a window is what there is now, or near enough to it."""
        return all(self._same(scene, part) for part in _parts(window))

    def _same(self, scene: Scene, window: Window) -> bool:
        if self.reuse is None:
            return same_bits(self.scene, scene, window)
        near = nearly_same_resampled if self.reuse.shift else nearly_same
        return near(self.scene, scene, window, self.reuse.tolerance)

    def pixels(self, scene: Scene, window: Window) -> NDArray[Any]:
        """The earlier result [B, h, w] over a window of the present scene."""
        if self.reuse is not None and self.reuse.shift:
            return resampled(self.result, scene.written, scene.framed(window), method="nearest")
        return self.result.read(scene.framed(window))

    def __str__(self) -> str:
        if self.reuse is None:
            return self.result.name
        within = f" within {self.reuse.tolerance:g}" if self.reuse.tolerance else ""
        return f"{self.result.name}{within}{', resampled' if self.reuse.shift else ''}"


def reuse_of(target: Path, scene: Scene, options: Options) -> Reuse | None:
    """What the options allow beyond equal bits; None where that comes to nothing.

    Raises:
        ValueError: no earlier result, or one that can't be brought onto the scene's grid.
    """
    if options.previous is None or not (options.tolerance or options.resample_previous):
        return None
    result, shift = _earlier(options.previous, target), ""
    if options.resample_previous:
        try:
            check_same_grid(result, scene.written)
        except GridError as error:
            shift = str(error)
            _, height, width = scene.written.shape
            under(result, scene.written, Window(0, 0, width, height))  # or it says why there is no way
    if not (options.tolerance or shift):
        return None
    source = result.tags.get(TAG, "")
    return Reuse(str(Path(result.name).absolute()), source, options.tolerance, shift)


def open_previous(
    target: Path,
    now_from: Sequence[str],
    scene: Scene,
    origin: Provenance,
    network: Network,
    options: Options,
    reuse: Reuse | None,
) -> Previous:
    """The earlier result (a file, or the folder that has it under the same name) with its scene.

    now_from: the addresses of the present scene.

    Raises:
        ValueError: no such result; made with another model, version or options, or from an input that changed
            since, or itself not computed in full; a scene on another grid, naming the shift.
    """
    assert options.previous is not None
    result = _earlier(options.previous, target)
    tags, now = result.tags, origin.tags()
    for name in _ALIKE:
        if tags.get(name) != now[name]:
            raise ValueError(f"--previous {result.name}: {name} was {tags.get(name)}, now it is {now[name]}")
    if "BIGVISION_REUSED" in tags:
        raise ValueError(
            f"--previous {result.name}: was not computed in full ({tags['BIGVISION_REUSED']}), and small "
            "changes add up: give a result that was"
        )
    # Of a URL the tag has no signature; where the scene is the same, it is read with today's.
    given = {shown_address(path): path for path in now_from}
    paths = tuple(given.get(name, name) for name in json.loads(tags["BIGVISION_INPUT"]))
    earlier = open_scene(paths, options)
    if reuse is None or not reuse.shift:
        try:
            check_same_grid(earlier.raster, scene.raster)
        except GridError as error:
            raise GridError(f"{error}: --resample-previous brings it onto this grid") from error
    was = provenance(paths, options, network, earlier.shape)
    if was.unknown:
        raise ValueError(
            f"--previous {result.name}: whether its input changed since can't be known: {was.unknown[0]}"
        )
    if was.fingerprint != tags.get(TAG):
        raise ValueError(
            f"--previous {result.name}: its input {paths[0]} or its model changed since it was made"
        )
    return Previous(earlier, result, reuse)


def copy_unchanged(previous: Previous, work: Computation) -> None:
    """Store the units that are left whose padded window (or scene, where all depends on all) is as it was.

    Raises:
        ValueError: an earlier result of another type or, where bits count, of other tiles.
    """
    scene, plan, writer = work.scene, work.plan, work.writer
    _check_alike(previous, plan)
    whole = Window(0, 0, scene.shape[2], scene.shape[1])
    if plan.phases is not None and not previous.same(scene, whole):
        return  # every row depends on the whole scene
    for unit in work.left():
        if plan.phases is not None or previous.same(scene, unit.padded):
            for strip in row_windows(unit.core, writer.shard[0]):
                writer.write(previous.pixels(scene, strip), scene.framed(strip))
            work.ledger.mark(unit.index, settle(writer, scene.framed(unit.core)), copied=True)


def _parts(window: Window) -> Iterator[Window]:
    """A window in parts that fit into memory, however wide it is."""
    end = window.col_off + window.width
    for strip in row_windows(window, _SIDE):
        for left in range(window.col_off, end, _SIDE):
            yield Window(left, strip.row_off, min(_SIDE, end - left), strip.height)


def _check_alike(previous: Previous, plan: Plan) -> None:
    """Refuse an earlier result whose pixels could differ for another reason than their input."""
    now = {"BIGVISION_DTYPE": plan.dtype}
    if previous.reuse is None:
        now |= {"BIGVISION_TILE": str(plan.tile), "BIGVISION_ENGINE": plan.engine}
    for name, value in now.items():
        was = previous.result.tags.get(name)
        if was != value:
            raise ValueError(f"--previous {previous.result.name}: {name} was {was}, now it is {value}")


def earlier_result(run: Path, target: Path) -> Path:
    """The result that `--previous` names: a file, or a folder that has one under the target's name."""
    return run / target.name if run.is_dir() and not (run / "zarr.json").exists() else run


def _earlier(run: Path, target: Path) -> Raster:
    path = earlier_result(run, target)
    try:
        return open_raster(path)
    except RasterError as error:
        raise ValueError(f"--previous {run}: no earlier result of this command is there: {error}") from error
