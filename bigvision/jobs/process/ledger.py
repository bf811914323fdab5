"""The folder of one unfinished result: what is being made, what is done, and its pixels so far.

A unit is marked only after its pixels are stored, so that a job killed at any moment loses at most the
units it was working on. The folder stands beside the result and is removed when the result is complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigvision.jobs.process.row_log import RowLog
from tiling.lock import locked
from tiling.publish import publish, staging_name


@dataclass(frozen=True)
class Ledger:
    """Picklable: any process that sees the folder may mark units."""

    folder: Path

    @property
    def pixels(self) -> Path:
        """The zarr store that fills up."""
        return self.folder / "pixels.zarr"

    @property
    def sums(self) -> Path:
        """Statistics over the scene, by phase and band."""
        return self.folder / "sums"

    @property
    def rows(self) -> Path:
        """Values that passes over the scene keep for later ones."""
        return self.folder / "rows"

    @property
    def strips(self) -> RowLog:
        """How far the units are that aren't marked yet."""
        return RowLog(self.folder / "strips")

    @property
    def draft(self) -> Path:
        """Where the finished file is written before it gets its name."""
        return self.folder / "result.tif"

    def mark(self, unit: int) -> None:
        """Note that a unit's pixels are stored."""
        (self.folder / "done" / str(unit)).touch()

    def done(self) -> frozenset[int]:
        """The units marked so far."""
        return frozenset(int(entry.name) for entry in os.scandir(self.folder / "done"))

    def read(self) -> dict[str, Any] | None:
        """What is being made, or None where nothing usable is here."""
        try:
            return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def begin(self, record: dict[str, Any]) -> None:
        """Forget what was here and note what is being made; the pixels' store must be there already."""
        (self.folder / "done").mkdir(exist_ok=True)
        staging = staging_name(self.folder / "run.json")
        staging.write_text(json.dumps(record, indent=1), encoding="utf-8")
        publish(staging, self.folder / "run.json")

    def clear(self) -> None:
        """Remove everything but the lock; `run.json` first, so that half a removal is no run."""
        (self.folder / "run.json").unlink(missing_ok=True)
        for entry in list(self.folder.iterdir()):
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def remove(self) -> None:
        """The result is complete: the folder goes."""
        shutil.rmtree(self.folder, ignore_errors=True)


def ledger_folder(target: Path) -> Path:
    """Where the unfinished result `target` is."""
    return target.with_name(f".{target.name}.run")


@contextmanager
def open_ledger(target: Path) -> Iterator[Ledger]:
    """The ledger of the result `target`, held by this process alone; ValueError while another holds it."""
    folder = ledger_folder(target)
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock", f"{target}: another process is making this result"):
        yield Ledger(folder)
