"""What is stored of each region of a routed scene, kept beside its pixels, or taken from a finished result.

Legend: R, S rows and columns of regions.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigvision.routing.boxes import Box
from bigvision.routing.record import RouteRecord, load_record
from tiling import Raster, RasterError, ZarrWriter, open_raster
from tiling.publish import publish
from tiling.shards import Stamp, forget, lost, settle

NOTHING, UNSURE = -2, -3  # nothing of a region is stored yet; it is being overwritten
ROUTE_TAG = "BIGVISION_ROUTE_SHA256"  # in a result: which record tells where its regions went
_BLOCK = 2048  # pixels copied at once


class RouteState:
    """Per region whose pixels are stored, its score, and whether it has data.

    Attributes:
        stored: int16 [R, S], an expert, -1 where there is no data, NOTHING or UNSURE.
        score: float32 [R, S]; data: bool [R, S].
        stamps: of the files of pixels.
    """

    def __init__(self, folder: Path, grid: tuple[int, int]) -> None:
        self.file = folder / "regions.npz"
        self.stored = np.full(grid, NOTHING, np.int16)
        self.score, self.data = np.zeros(grid, np.float32), np.zeros(grid, bool)
        self.stamps: dict[str, Stamp] = {}

    def reset(self) -> None:
        """Nothing is stored."""
        self.stored[:], self.score[:], self.data[:], self.stamps = NOTHING, 0, False, {}

    def load(self) -> bool:
        """Whether an earlier run of the same grid left a state."""
        try:
            with np.load(self.file) as found:
                arrays = [found[name].astype(own.dtype) for name, own in self._arrays().items()]
                stamps = dict(json.loads(str(found["stamps"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return False
        if any(array.shape != self.stored.shape for array in arrays):
            return False
        self.stored, self.score, self.data = arrays
        self.stamps = {name: None if one is None else (one[0], one[1]) for name, one in stamps.items()}
        return True

    def check(self, writer: ZarrWriter, region: int) -> None:
        """Forget the regions, of `region` pixels a side, whose pixels are no longer what was stored."""
        gone = set(lost(writer.staging, self.stamps))
        tall, wide = (-(-side // region) for side in writer.shard)
        for name in gone:
            row, column = map(int, name.split("/")[-2:])
            self.stored[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide] = NOTHING
        forget(writer.staging, {*self.stamps} - gone)
        self.stamps = {name: one for name, one in self.stamps.items() if name not in gone}
        self.save()

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"stored": self.stored, "score": self.score, "data": self.data}

    def save(self) -> None:
        """Appears whole or not at all."""
        beside = self.file.with_suffix(".partial.npz")
        stamps = np.array(json.dumps(self.stamps))
        np.savez(beside, stored=self.stored, score=self.score, data=self.data, stamps=stamps)
        publish(beside, self.file)

    def mark(self, cells: Iterable[Box], what: int) -> None:
        """Note what is stored of boxes of regions, for good."""
        for cell in cells:
            self.stored[cell.top : cell.bottom, cell.left : cell.right] = what
        self.save()

    def take(self, record: RouteRecord) -> None:
        """As a finished result left it."""
        self.stored, self.score, self.data = record.expert.copy(), record.score.copy(), record.expert >= 0


def record_file(target: Path) -> Path:
    """Where the record of a result stands."""
    return target.with_suffix(".route.tif")


def picture_file(target: Path) -> Path:
    """Where the picture of it stands."""
    return target.with_suffix(".route.png")


def earlier_route(target: Path, base: str) -> tuple[RouteRecord, Raster] | None:
    """A finished result at `target` of the same scene, networks and regions, and where its regions went.

    None where there is none, or where the record is not this result's.
    """
    try:
        record, result = load_record(record_file(target)), open_raster(target)
    except (ValueError, RasterError):
        return None
    known = record.made_by == base and result.tags.get(ROUTE_TAG) == record.digest
    return (record, result) if known else None


def copy_pixels(result: Raster, writer: ZarrWriter) -> dict[str, Stamp]:
    """All pixels of a finished result into a store; the stamps of its files."""
    stamps: dict[str, Stamp] = {}
    for tile in writer.grid(_BLOCK):
        writer.write(result.read(tile.core), tile.core)
        stamps |= settle(writer, tile.core)
    return stamps
