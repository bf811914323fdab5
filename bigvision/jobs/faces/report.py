"""What a run says while it goes: one bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Speaks for the leading rank; silent on the others. A context manager."""

    def __init__(self, speaks: bool, total: int, done: int) -> None:
        self.speaks = speaks
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        if speaks and sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.speaks:
            self._console.print(text, markup=False, soft_wrap=True)

    def progress(self, step: int, text: str) -> None:
        """Where the run is: on the bar, or as a line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(text)
