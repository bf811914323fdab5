"""How much memory this process and those it started hold, watched while they work."""

import threading
from types import TracebackType

import psutil


def resident_bytes() -> int:
    """Resident memory of this process and all its descendants; the libraries that they share count once."""
    here = psutil.Process()
    total = here.memory_info().rss
    for child in here.children(recursive=True):
        try:
            held = child.memory_info()
            total += held.rss - getattr(held, "shared", 0)  # file-backed pages; only Linux tells
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total


class MemoryWatch:
    """Within this block, `peak` is the most bytes seen so far and `now` those seen last."""

    def __init__(self, interval: float = 0.2) -> None:
        self.interval, self.now, self.peak = interval, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")

    def __enter__(self) -> "MemoryWatch":
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = 0
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        self.now = resident_bytes()
        self.peak = max(self.peak, self.now)
