"""`--previous RUN`: tiles of a revisit whose input did not change are copied from the earlier result.

A tile is computed in a shape of its own that doesn't depend on its neighbours, so that the result is, bit by
bit, that of computing every tile.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.network import Network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.provenance import TAG, Provenance, provenance
from bigvision.jobs.process.scene import Scene, open_scene
from bigvision.routing.grids import check_same_grid
from tiling import Raster, RasterError, Tile, ZarrWriter, open_raster

_ALIKE = ("BIGVISION_VERSION", "BIGVISION_MODEL_SHA256", "BIGVISION_OPTIONS")


@dataclass(frozen=True)
class Previous:
    """An earlier run: what it saw and what it gave."""

    scene: Scene
    result: Raster


def open_previous(
    run: Path, target: Path, scene: Scene, origin: Provenance, network: Network, options: Options
) -> Previous:
    """The earlier result (a file, or the folder that has it under the same name) with its scene.

    Raises:
        ValueError: no such result; made with another model, version or options, or from an input that changed
            since; a scene on another grid, naming the shift.
    """
    path = run / target.name if run.is_dir() and not (run / "zarr.json").exists() else run
    try:
        result = open_raster(path)
    except RasterError as error:
        raise ValueError(f"--previous {run}: no earlier result of this command is there: {error}") from error
    tags, now = result.tags, origin.tags()
    for name in _ALIKE:
        if tags.get(name) != now[name]:
            raise ValueError(f"--previous {path}: {name} was {tags.get(name)}, now it is {now[name]}")
    paths = tuple(json.loads(tags["BIGVISION_INPUT"]))
    earlier = open_scene(paths, options)
    check_same_grid(earlier.raster, scene.raster)
    if provenance(paths, options, network).fingerprint != tags.get(TAG):
        raise ValueError(f"--previous {path}: its input {paths[0]} or its model changed since it was made")
    return Previous(earlier, result)


def copy_unchanged(
    previous: Previous, scene: Scene, plan: Plan, writer: ZarrWriter, ledger: Ledger, units: Sequence[Tile]
) -> list[Tile]:
    """Store the units whose padded window (or scene, where all depends on all) is as it was.

    Returns those that must be computed.

    Raises:
        ValueError: an earlier result of other tiles or another type, whose pixels could differ in their bits.
    """
    tags = previous.result.tags
    made = (tags.get("BIGVISION_TILE"), tags.get("BIGVISION_DTYPE"), tags.get("BIGVISION_ENGINE"))
    if made != (str(plan.tile), plan.dtype, plan.engine):
        raise ValueError(
            f"--previous {previous.result.name}: its tiles, type and engine were {made}, now they are "
            f"{(str(plan.tile), plan.dtype, plan.engine)}"
        )
    same = partial(_unchanged, previous.scene, scene)
    if plan.phases is not None and not all(same(unit.core) for unit in plan.grid(scene.shape, writer)):
        return list(units)  # every row depends on the whole scene
    left = []
    for unit in units:
        if plan.phases is not None or same(unit.padded):
            writer.write(previous.result.read(unit.core), unit.core)
            ledger.mark(unit.index)
        else:
            left.append(unit)
    return left


def _unchanged(before: Scene, now: Scene, window: Window) -> bool:
    pixels, valid = now.read(window)
    earlier, shown = before.read(window)
    # Bits, not values: NaN equals itself, and -0 is not 0.
    return bool(
        np.array_equal(valid, shown) and np.array_equal(pixels.view(np.int32), earlier.view(np.int32))
    )
