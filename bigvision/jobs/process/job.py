"""The whole command: every scene, one after the other, with progress, a closing table and a report."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bigvision.jobs.process.batch import find_scenes
from bigvision.jobs.process.batch_precision import precision_of
from bigvision.jobs.process.cluster import open_client
from bigvision.jobs.process.display import print_table, printable, show_progress, stopped_line
from bigvision.jobs.process.network import network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.places import check_batch
from bigvision.jobs.process.precision import Precision
from bigvision.jobs.process.report import check_report, write_report
from bigvision.jobs.process.run import Outcome, Watcher, run_scene
from bigvision.jobs.process.usage import MemoryWatch
from tiling.addresses import without_secrets

if TYPE_CHECKING:
    from distributed import Client


def process_scenes(scenes: Sequence[str], out: Path, options: Options, *, report: Path | None = None) -> bool:
    """Process scenes (files, globs, directories) into the folder `out`; True if all succeeded.

    What is wrong with one scene is told in the closing table and stops no other. ValueError or OSError is
    raised for what concerns them all: no scene, a folder that can't be written, a scheduler that is silent.
    Interrupted, one line says what is kept.
    """
    found = find_scenes(scenes, out, options)
    network_spec(options, channels=1)  # a device that isn't here concerns every scene
    check_batch(found, options, report)
    _check_writable(out)
    if report is not None:
        check_report(report)
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    try:
        precision = precision_of(found, options)
        with open_client(options) as client, MemoryWatch() as watch:
            for paths, target in found:
                watch.restart()
                with show_progress(console, watch) as watcher:
                    outcome = _attempt(paths, target, options, client, watcher, precision)
                outcomes.append(replace(outcome, peak_bytes=watch.peak))
                if outcome.warning:
                    warning = printable(f"warning: {outcome.scene}: {outcome.warning}")
                    console.print(warning, highlight=False, markup=False, soft_wrap=True)
                if report is not None:
                    write_report(report, outcomes)
    except KeyboardInterrupt as stop:
        names = [without_secrets(paths[0]) for paths, _ in found]
        line = printable(stopped_line(stop, names, outcomes))
        console.print(line, markup=False, soft_wrap=True)
        raise
    print_table(outcomes)
    return all(outcome.status != "failed" for outcome in outcomes)


def _attempt(
    paths: tuple[str, ...],
    target: Path,
    options: Options,
    client: "Client | None",
    watcher: Watcher,
    precision: Precision | None,
) -> Outcome:
    try:
        return run_scene(paths, target, options, client=client, watcher=watcher, precision=precision)
    except Exception as error:  # whatever a damaged file makes of its reader, the others are processed
        scene, told = without_secrets(paths[0]), " ".join(str(error).split())
        for path in paths:
            told = told.replace(path, without_secrets(path))
        if not isinstance(error, ValueError | OSError | RuntimeError) or not told:
            told = f"{scene}: {type(error).__name__} {told}".rstrip()
        return Outcome(scene, str(target), "failed", error=without_secrets(told))


def _check_writable(out: Path) -> None:
    """OSError, naming the folder, unless a file can be made in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except FileExistsError as error:
        raise OSError(f"{out}: can't be written to: it is a file, no folder") from error
    except OSError as error:
        raise OSError(f"{out}: can't be written to: {error.strerror or error}") from error
