"""Damaged records: named in a file, counted, and a reason to stop where they are many.

A few in a million are usual. A drive that went away makes all of them damaged, and a run that trained on
would end well with a backbone that saw nothing.
"""

from pathlib import Path

from bigvision.jobs.faces.agreement import World
from datasets.face_images import printable

FEW = 1000  # images, or an epoch where that is less: shares of fewer say little


class TooManyDamagedError(ValueError):
    """More records were damaged than `--max-damaged` allows."""


class DamagedRecords:
    """What this rank met; all counts are those of all ranks, brought together by `gather`."""

    def __init__(self, world: World, most: float, epoch: int) -> None:
        self.world, self.most, self.enough = world, most, min(FEW, epoch)
        self.names: set[str] = set()
        self._read, self._damaged = 0, 0  # of this rank, since the last `gather`
        self._window_read, self._window_damaged = 0, 0  # of all ranks

    def add(self, read: int, damaged: tuple[str, ...]) -> None:
        """Count a batch of this rank."""
        self._read += read
        self._damaged += len(damaged)
        self.names.update(damaged)

    def gather(self, step: int) -> float:
        """Bring the ranks' names together; the damaged share of what all read lately. On all ranks together.

        Raises `TooManyDamagedError` on all ranks where more than the allowed share of what was read lately
        was damaged, or all of it.
        """
        found = self.world.gather((self._read, self._damaged, self.names))
        self._read, self._damaged = 0, 0
        self.names = set[str]().union(*(names for _, _, names in found))
        self._window_read += sum(read for read, _, _ in found)
        self._window_damaged += sum(damaged for _, damaged, _ in found)
        share = self._window_damaged / max(1, self._window_read)
        if share == 1 or (share > self.most and self._window_read >= self.enough):
            raise TooManyDamagedError(
                f"step {step}: {self._window_damaged:,} of {self._window_read:,} images are damaged, "
                f"more than --max-damaged {self.most:g} allows; one of them: {min(self.names)}"
            )
        if self._window_read >= self.enough:
            self._window_read, self._window_damaged = 0, 0
        return share

    def write(self, folder: Path) -> None:
        """Write the names to `damaged.txt`, where there are any."""
        if self.names:
            text = "".join(f"{printable(name)}\n" for name in sorted(self.names))
            (folder / "damaged.txt").write_text(text)
