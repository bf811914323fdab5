"""Ctrl-C and SIGTERM while a run works: obeyed between two steps, where its state can be kept."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_PATIENCE = 5.0  # seconds
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Asked(KeyboardInterrupt):
    """The user or the system wants the run to end."""


class Stops:
    """Notes Ctrl-C and SIGTERM; at the end of the block they arrive as they do elsewhere, if `passed_on`.

    Within `at_once` one raises `Asked` immediately. Asked again after some seconds, a run that doesn't come
    to an end is interrupted wherever it is (at once would be too soon: torchrun passes a Ctrl-C on to
    processes that have heard it already). Threads other than the first can't hear signals: there the block
    changes nothing.
    """

    def __init__(self, *, passed_on: bool = True) -> None:
        self._passed_on = passed_on
        self._number: int | None = None
        self._first = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._number is not None

    @property
    def status(self) -> int:
        """The exit status of a process that ended for it, 0 for one that wasn't asked to."""
        return 0 if self._number is None else 128 + self._number

    @property
    def name(self) -> str:
        """Who asked."""
        return _NAMES.get(signal.Signals(self._number), "") if self._number else "another rank"

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it nothing is lost by ending at any point."""
        self._at_once = True
        try:
            if self.asked:
                raise Asked
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:  # nohup, or a shell's background job
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._number is not None and self._passed_on:
            signal.raise_signal(self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._first = number, time.monotonic()
        if self._at_once:
            raise Asked
        if time.monotonic() - self._first > _PATIENCE:
            raise KeyboardInterrupt
