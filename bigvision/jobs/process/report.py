"""The report for programs: one JSON document of all scenes."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bigvision.jobs.process.run import Outcome
from tiling.publish import check_free, publish, staging_name


def write_report(path: Path, outcomes: Sequence[Outcome]) -> None:
    """{"scenes": [...]}, each with the fields of `Outcome` and its megapixels a second; appears complete."""
    scenes = [asdict(outcome) | {"mpx_per_second": _speed(outcome)} for outcome in outcomes]
    staging = staging_name(path)
    staging.write_text(json.dumps({"scenes": scenes}, indent=1), encoding="utf-8")
    publish(staging, path)


def check_report(path: Path) -> None:
    """ValueError where `path` can't be written, or holds something else than such a report."""
    check_free(path, overwrite=True)
    if not os.path.lexists(path):
        return
    try:
        known = path.is_file() and isinstance(json.loads(path.read_bytes())["scenes"], list)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: exists and is no report, so it stays; choose another --json, or move it away"
        )


def _speed(outcome: Outcome) -> float | None:
    return outcome.computed / outcome.seconds / 1e6 if outcome.computed and outcome.seconds else None
