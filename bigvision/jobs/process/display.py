"""What the user sees: a progress bar while scenes are processed, and a table at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bigvision.jobs.process.computing import Interrupted
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.run import Outcome, Watcher
from bigvision.jobs.process.usage import MemoryWatch


class _Speed(ProgressColumn):
    """Megapixels a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{(task.speed or 0) / 1e6:.2f} Mpx/s")


class _Memory(ProgressColumn):
    """Resident memory of all processes here."""

    def __init__(self, watch: MemoryWatch) -> None:
        super().__init__()
        self.watch = watch

    def render(self, task: Task) -> Text:
        return Text(f"{self.watch.now / 2**30:.2f} GiB")


class Bar(Watcher):
    """One line for the scene in work."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console = progress, console
        self.task = progress.add_task("", total=None)

    def planned(self, scene: str, plan: Plan, pixels: int, left: int) -> None:
        """Say how the scene is cut, and set the bar to what is left."""
        self.console.print(_cut(scene, plan, pixels, left), highlight=False, markup=False, soft_wrap=True)
        self.progress.reset(self.task, total=max(left, 1), description=Path(scene).name)

    def stage(self, text: str, pixels: int) -> None:
        """Set the bar to what is next."""
        self.progress.reset(self.task, total=max(pixels, 1), description=text)

    def computed(self, pixels: float) -> None:
        """Move the bar."""
        self.progress.advance(self.task, pixels)

    def finishing(self, fraction: float) -> None:
        """The bar is full; say what still goes on."""
        self.progress.update(self.task, description=f"writing {fraction:.0%}")


class Lines(Watcher):
    """The same for a log: a line when work begins, and one whenever another tenth of it is done."""

    def __init__(self, console: Console, watch: MemoryWatch, clock: Callable[[], float] = monotonic) -> None:
        self.console, self.watch, self.clock = console, watch, clock
        self.name, self.left, self.done, self.begun = "", 0, 0.0, 0.0

    def planned(self, scene: str, plan: Plan, pixels: int, left: int) -> None:
        """Say how the scene is cut."""
        self._say(_cut(scene, plan, pixels, left))
        self.stage(Path(scene).name, left)

    def stage(self, text: str, pixels: int) -> None:
        """Count what is next from nothing."""
        self.name, self.left, self.done, self.begun = text, max(pixels, 1), 0.0, self.clock()

    def computed(self, pixels: float) -> None:
        """A line for each tenth."""
        tenths = int(10 * self.done / self.left)
        self.done += pixels
        if int(10 * self.done / self.left) > tenths:
            seconds = max(self.clock() - self.begun, 1e-9)
            remaining = timedelta(seconds=round(seconds * (self.left - self.done) / self.done))
            self._say(
                f"{self.name}: {self.done / self.left:.0%}, {self.done / seconds / 1e6:.2f} Mpx/s, "
                f"{remaining} left, {self.watch.now / 2**30:.2f} GiB"
            )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _cut(scene: str, plan: Plan, pixels: int, left: int) -> str:
    """How a scene is cut, in one line."""
    same = ""
    if plan.agreement is not None:
        same = f" ({plan.agreement:.2%} is the same in bfloat16)"
    resumed = "" if left == pixels else f"; {1 - left / pixels:.0%} was finished before"
    return (
        f"{scene}: {plan.exactness}, {plan.dtype}{same}, {plan.cut}, "
        f"about {plan.predicted_bytes / 2**30:.1f} GiB{resumed}"
    )


@contextmanager
def show_progress(console: Console, watch: MemoryWatch) -> Iterator[Watcher]:
    """A bar with speed, time left and memory; lines of them where nobody watches a terminal."""
    if not console.is_terminal:
        yield Lines(console, watch)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _Speed(),
        TimeRemainingColumn(),
        _Memory(watch),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=60) as progress:
        yield Bar(progress, console)


def stopped_line(stop: KeyboardInterrupt, scenes: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """What an interrupted command leaves: scenes that are finished, and what is kept of the next one."""
    finished = sum(outcome.status != "failed" for outcome in outcomes)
    line = f"stopped: {finished} of {len(scenes)} scene(s) finished"
    if isinstance(stop, Interrupted) and len(outcomes) < len(scenes):
        line += f", {stop.kept:.0%} of {scenes[len(outcomes)]} kept"
    return f"{line}; the same command goes on from there"


def printable(text: str) -> str:
    """Names that are no UTF-8 stand in a table, too."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_table(outcomes: Sequence[Outcome]) -> None:
    """What became of each scene, on standard output: as wide as the terminal, or as a file needs it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120 + max(len(o.error or o.result) for o in outcomes))
    table = Table(box=None, pad_edge=False)
    for name in ("scene", "status", "Mpx", "Mpx/s", "memory", "result or error"):
        table.add_column(name, overflow="fold", justify="right" if name.startswith("M") else "left")
    for outcome in outcomes:
        speed = outcome.computed / outcome.seconds / 1e6 if outcome.seconds and outcome.computed else 0
        cells = (
            Path(outcome.scene).name,
            outcome.status,
            f"{outcome.pixels / 1e6:.1f}" if outcome.pixels else "",
            f"{speed:.2f}" if speed else "",
            f"{outcome.peak_bytes / 2**30:.2f} GiB" if outcome.peak_bytes else "",
            outcome.error or "\n".join(filter(None, (outcome.result, outcome.routed))),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table, highlight=False)
