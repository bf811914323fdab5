"""The folder of one unfinished result: what is being made, what is done, and its pixels so far.

A unit is marked only after its pixels are on the disk, with stamps of their files, so that a job killed at
any moment, even with its machine, loses at most the units it was working on. The folder stands beside the
result and is removed when the result is complete.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigvision.jobs.process.row_log import RowLog
from tiling.behind import check_file
from tiling.lock import locked
from tiling.publish import publish, staging_name
from tiling.shards import Stamp, forget, lost


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

    def mark(self, unit: int, stamps: Mapping[str, Stamp], *, copied: bool = False) -> None:
        """Note that a unit's pixels are on the disk. stamps: of the shards that no line of `strips` tells of.

        copied: they are those of an earlier result.
        """
        place = self.folder / "done" / str(unit)
        staging = place.with_name(f".{unit}.{uuid.uuid4().hex[:8]}")
        staging.write_text(json.dumps({"stamps": stamps, "copied": copied}), encoding="utf-8")
        staging.replace(place)

    def done(self) -> frozenset[int]:
        """The units marked so far."""
        return frozenset(
            int(entry.name) for entry in os.scandir(self.folder / "done") if entry.name.isdecimal()
        )

    def copied(self) -> frozenset[int]:
        """Those of them that are an earlier result's."""
        return frozenset(unit for unit in self.done() if self._mark(unit).get("copied"))

    def check(self) -> int:
        """Forget the units and rows whose pixels are no longer what was stored; returns of how many units.

        Files of pixels that nothing vouches for are removed.
        """
        harmed, sound = 0, set[str]()
        for unit in {*self.done(), *self.strips.units()}:
            stamps: dict[str, Stamp] = {}
            for _, those, _ in sorted(self.strips.lines(unit), key=lambda line: line.rows):
                stamps |= those
            mark = self._mark(unit) if unit in self.done() else None
            if mark is not None:
                stamps |= {
                    name: None if one is None else (one[0], one[1]) for name, one in mark["stamps"].items()
                }
            gone = set(lost(self.pixels, stamps))
            sound |= {*stamps} - gone
            if gone or (mark is not None and not stamps):
                harmed += 1
                (self.folder / "done" / str(unit)).unlink(missing_ok=True)
                self.strips.cut(unit, gone)
        forget(self.pixels, sound)
        return harmed

    def _mark(self, unit: int) -> dict[str, Any]:
        """What a mark says; without stamps where it is damaged."""
        try:
            mark = json.loads((self.folder / "done" / str(unit)).read_bytes())
            return {"stamps": dict(mark["stamps"]), "copied": bool(mark["copied"])}
        except (OSError, ValueError, TypeError, LookupError):
            return {"stamps": {}, "copied": False}

    def read(self) -> tuple[dict[str, Any] | None, str]:
        """(What is being made, or None where nothing usable is here; what is wrong with what is here)."""
        try:
            found = json.loads((self.folder / "run.json").read_bytes())
            if isinstance(found, dict) and isinstance(found.get("fingerprint"), str):
                return found, ""
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError) as error:
            return None, f"run.json: {error}"
        return None, "run.json: not what this version writes"

    def begin(self, record: dict[str, Any]) -> None:
        """Forget what was here and note what is being made; the pixels' store must be there already."""
        (self.folder / "done").mkdir(exist_ok=True)
        staging = staging_name(self.folder / "run.json")
        staging.write_text(json.dumps(record, indent=1), encoding="utf-8")
        publish(staging, self.folder / "run.json")

    def clear(self) -> None:
        """Remove everything but the lock; `run.json` first, so that half a removal is no run."""
        record = self.folder / "run.json"
        if not record.is_dir():
            record.unlink(missing_ok=True)
        for entry in list(self.folder.iterdir()):
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def remove(self) -> None:
        """The result is complete: the folder goes."""
        shutil.rmtree(self.folder, ignore_errors=True)


def ledger_folder(target: Path) -> Path:
    """Where the unfinished result `target` is."""
    return target.with_name(f".{target.name}.run")


@contextmanager
def open_ledger(target: Path) -> Iterator[Ledger]:
    """The ledger of the result `target`, held by this process alone; ValueError while another holds it.

    Where nothing was begun, nothing is left.
    """
    folder = ledger_folder(target)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(
            f"{folder}: is no folder, and unfinished work of {target.name} goes there; move it away"
        )
    folder.mkdir(exist_ok=True)
    lock = folder / "lock"
    if lock.is_dir():
        raise ValueError(f"{lock}: is a folder, and the lock of unfinished work goes there; move it away")
    check_file(lock)
    with locked(lock, f"{target}: another process is making this result"):
        ledger = Ledger(folder)
        try:
            yield ledger
        finally:
            if not os.path.lexists(folder / "run.json"):
                ledger.remove()


def remove_left(target: Path) -> None:
    """What a command left that was killed after `target` had its name; nothing while another makes it."""
    if ledger_folder(target).is_dir():
        with suppress(ValueError), open_ledger(target) as ledger:
            ledger.remove()
