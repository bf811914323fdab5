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

from tiling.shards import Stamp


@dataclass(frozen=True)
class RowLog:
    """A file a unit in `folder`; picklable: any process that sees the folder may add lines."""

    folder: Path

    def add(self, unit: int, rows: int, stamps: Mapping[str, Stamp] | None = None) -> None:
        """Note that the first `rows` rows of a unit are stored. Two who compute one unit may both say so."""
        self.folder.mkdir(exist_ok=True)
        line = json.dumps([rows, stamps or {}]).encode() + b"\n"
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
        return max((rows for rows, _ in self.lines(unit)), default=0)

    def lines(self, unit: int) -> list[tuple[int, dict[str, Stamp]]]:
        """What is noted of a unit: rows, and the stamps of the strip that ends there."""
        try:
            text = (self.folder / str(unit)).read_text(encoding="ascii", errors="replace")
        except OSError:
            return []
        return [line for line in map(_parsed, text.split("\n")[:-1]) if line is not None]

    def cut(self, unit: int, lost: set[str]) -> None:
        """Forget a unit's rows from the first strip on that has one of the shards `lost`."""
        kept = sorted(self.lines(unit), key=lambda line: line[0])
        end = next((k for k, (_, stamps) in enumerate(kept) if lost & {*stamps}), len(kept))
        if end < len(kept):
            (self.folder / str(unit)).unlink()
            for rows, stamps in kept[:end]:
                self.add(unit, rows, stamps)


def _parsed(line: str) -> tuple[int, dict[str, Stamp]] | None:
    try:
        rows, stamps = json.loads(line)
        return int(rows), {
            str(name): None if one is None else (one[0], one[1]) for name, one in stamps.items()
        }
    except (ValueError, TypeError, AttributeError, LookupError):
        return None
