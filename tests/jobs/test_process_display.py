"""What is said while scenes are processed and nobody watches a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bigvision.jobs.process.display import Lines, show_progress
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.usage import MemoryWatch

PLAN = Plan("stream", 8192, 32, 288, "exact", "bfloat16", 0.9995, 3 * 2**30, 1, 64)


def watched(now: int) -> MemoryWatch:
    watch = MemoryWatch()
    watch.now = now
    return watch


def test_a_log_gets_a_line_a_tenth() -> None:
    times = iter([100.0, 110.0, 150.0, 200.0])
    console = Console(file=io.StringIO())
    lines = Lines(console, watched(2**31), clock=lambda: next(times))
    lines.planned("in/a.tif", PLAN, 8_000_000, 4_000_000)
    for share in (0.05, 0.05, 0.4, 0.5):
        lines.computed(share * 4_000_000)
    lines.finishing(0.5)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "in/a.tif: exact, bfloat16 (99.95% is the same in bfloat16), streamed bands of "
        "8192 rows with a halo of 288 px, about 3.0 GiB; 50% was finished before",
        "a.tif: 10%, 0.04 Mpx/s, 0:01:30 left, 2.00 GiB",
        "a.tif: 50%, 0.04 Mpx/s, 0:00:50 left, 2.00 GiB",
        "a.tif: 100%, 0.04 Mpx/s, 0:00:00 left, 2.00 GiB",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_and_a_log_no_empty_lines(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with show_progress(console, watched(0)) as watcher:
        watcher.planned("a.tif", replace(PLAN, engine="tiles", agreement=None), 100, 100)
        watcher.computed(100)
        watcher.finishing(0.5)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(watcher, Lines) is not terminal
    assert "a.tif: exact, bfloat16, tiles of 8192 px" in text
    assert ("\x1b[" in text) is terminal and (terminal or "" not in text.splitlines())
