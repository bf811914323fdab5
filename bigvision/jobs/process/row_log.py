"""How far each unfinished unit of a result is: rows from its top that are stored, noted strip by strip.

Rows leave a network from top to bottom, so one number says what is left of a unit. A line is added only after
its strip is stored, with the stamps of its shards; the last line of a job that was killed may be torn, and
counts for nothing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tiling.shards import Stamp


@dataclass(frozen=True)
class RowLog:
    """A file a unit in `folder`; picklable: any process that sees the folder may add lines."""

    folder: Path

    def add(self, unit: int, rows: int, stamps: Mapping[str, Stamp] | None = None, spoilt: int = 0) -> None:
        """Note that the first `rows` rows of a unit are stored, and in the last strip of them so many pixels
        with data came to nothing. Two who compute one unit may both say so."""
        self.folder.mkdir(exist_ok=True)
        line = json.dumps([rows, stamps or {}, spoilt]).encode() + b"\n"
        file = os.open(self.folder / str(unit), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def all(self) -> dict[int, int]:
        """Rows stored, by unit."""
        return {unit: self.rows(unit) for unit in self.units()}

    def units(self) -> list[int]:
        """Those that anything is noted of."""
        names = [entry.name for entry in os.scandir(self.folder)] if self.folder.is_dir() else []
        return [int(name) for name in names if name.isdecimal()]

    def rows(self, unit: int) -> int:
        """How many rows of a unit are stored, from its top."""
        return max((line.rows for line in self.lines(unit)), default=0)

    def spoilt(self) -> int:
        """Pixels of all units that have data, but came to nothing."""
        strips = {(unit, line.rows): line.spoilt for unit in self.units() for line in self.lines(unit)}
        return sum(strips.values())

    def lines(self, unit: int) -> list["Line"]:
        """What is noted of a unit."""
        try:
            text = (self.folder / str(unit)).read_text(encoding="ascii", errors="replace")
        except OSError:
            return []
        return [line for line in map(_parsed, text.split("\n")[:-1]) if line is not None]

    def cut(self, unit: int, lost: set[str]) -> None:
        """Forget a unit's rows from the first strip on that has one of the shards `lost`."""
        kept = sorted(self.lines(unit), key=lambda line: line.rows)
        end = next((k for k, line in enumerate(kept) if lost & {*line.stamps}), len(kept))
        if end < len(kept):
            (self.folder / str(unit)).unlink()
            for line in kept[:end]:
                self.add(unit, line.rows, line.stamps, line.spoilt)


class Line(NamedTuple):
    """Rows of a unit from its top, the stamps of the strip that ends there, and its pixels that came to
    nothing."""

    rows: int
    stamps: dict[str, Stamp]
    spoilt: int


def _parsed(line: str) -> Line | None:
    try:
        rows, stamps, spoilt = json.loads(line)
        known = {str(name): None if one is None else (one[0], one[1]) for name, one in stamps.items()}
        return Line(int(rows), known, int(spoilt))
    except (ValueError, TypeError, AttributeError, LookupError):
        return None
