"""How work comes along: told by the threads that do it, or looked up where other processes do."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bigvision.jobs.process.ledger import Ledger
from tiling import Tile

Progress = Callable[[int], object]
"""Is told how many more pixels are stored."""

_INTERVAL = 1.0  # seconds between two looks


def stored_pixels(ledger: Ledger, units: Sequence[Tile]) -> int:
    """Pixels of units that are stored, of unfinished ones too."""
    done, rows = ledger.done(), ledger.strips.all()
    return sum(
        unit.core.width * (unit.core.height if unit.index in done else rows.get(unit.index, 0))
        for unit in units
    )


@contextmanager
def followed(
    progress: Progress, *, remote: bool, stored: Callable[[], int], interval: float = _INTERVAL
) -> Iterator[Progress | None]:
    """Yields what threads here may tell at any time; None where work is `remote`, and looked up by `stored`.

    stored: pixels of this work that are stored by now. `progress` is never called twice at once.
    """
    if not remote:
        yield _one_by_one(progress)
        return
    over, known = threading.Event(), stored()

    def look() -> None:
        nonlocal known
        now = stored()
        if now > known:
            progress(now - known)
            known = now

    def watch() -> None:
        while not over.wait(interval):
            look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield None
    finally:
        over.set()
        thread.join()
    look()


def _one_by_one(progress: Progress) -> Progress:
    lock = threading.Lock()

    def tell(more: int) -> None:
        with lock:
            progress(more)

    return tell
