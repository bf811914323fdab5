"""What a run says while it works: a line an epoch, and one at least every half minute between them."""

import time
from collections.abc import Callable

_EVERY = 30.0  # seconds


class Progress:
    """Tells steps, loss and the time that is left.

    Args:
        say: takes a line.
        total, per_epoch: steps of the run and of an epoch.
    """

    def __init__(self, say: Callable[[str], None], total: int, per_epoch: int) -> None:
        self.say, self.total, self.per_epoch = say, total, per_epoch

    def begin(self, done: int) -> None:
        """Work begins, `done` steps into the run."""
        self._first, self._started = done, time.monotonic()
        self._told = self._started

    def step(self, done: int, loss: float) -> None:
        """A step within an epoch; `loss` is its mean so far."""
        if time.monotonic() - self._told >= _EVERY:
            place = f"step {(done - 1) % self.per_epoch + 1}/{self.per_epoch}"
            self._tell(done, f"{self._epoch(done)}  {place}", loss, "")

    def epoch(self, done: int, loss: float, scored: str) -> None:
        """The end of an epoch: its mean loss and what the held-out scenes said."""
        self._tell(done, self._epoch(done), loss, scored)

    def _epoch(self, done: int) -> str:
        return f"epoch {(done - 1) // self.per_epoch + 1}/{self.total // self.per_epoch}"

    def _tell(self, done: int, place: str, loss: float, scored: str) -> None:
        self._told = time.monotonic()
        each = (self._told - self._started) / max(1, done - self._first)
        left = f"  {_clock(each * (self.total - done))} left" if done < self.total else ""
        self.say(f"{place}  loss {loss:.4f}  {each:.2f} s a step{left}{scored}")


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
