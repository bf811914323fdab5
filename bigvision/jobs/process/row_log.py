"""How far each unfinished unit of a result is: rows from its top that are stored, noted strip by strip.

Rows leave a network from top to bottom, so one number says what is left of a unit. A line is added only after
its strip is stored; the last line of a job that was killed may be torn, and counts for nothing.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RowLog:
    """A file a unit in `folder`; picklable: any process that sees the folder may add lines."""

    folder: Path

    def add(self, unit: int, rows: int) -> None:
        """Note that the first `rows` rows of a unit are stored. Two who compute one unit may both say so."""
        self.folder.mkdir(exist_ok=True)
        line = f"{rows}\n".encode()
        file = os.open(self.folder / str(unit), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def all(self) -> dict[int, int]:
        """Rows stored, by unit."""
        names = [entry.name for entry in os.scandir(self.folder)] if self.folder.is_dir() else []
        return {int(name): self.rows(int(name)) for name in names if name.isdecimal()}

    def rows(self, unit: int) -> int:
        """How many rows of a unit are stored, from its top."""
        try:
            lines = (self.folder / str(unit)).read_text(encoding="ascii", errors="replace").split("\n")
        except OSError:
            return 0
        return max((int(line) for line in lines[:-1] if line.isdecimal()), default=0)
