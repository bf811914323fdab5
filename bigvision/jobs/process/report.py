"""The report for programs: one JSON document of all scenes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bigvision.jobs.process.run import Outcome
from tiling.publish import publish, staging_name


def write_report(path: Path, outcomes: Sequence[Outcome]) -> None:
    """{"scenes": [...]}, each with the fields of `Outcome` and its megapixels a second; appears complete."""
    scenes = [asdict(outcome) | {"mpx_per_second": _speed(outcome)} for outcome in outcomes]
    staging = staging_name(path)
    staging.write_text(json.dumps({"scenes": scenes}, indent=1), encoding="utf-8")
    publish(staging, path)


def _speed(outcome: Outcome) -> float | None:
    return outcome.computed / outcome.seconds / 1e6 if outcome.computed and outcome.seconds else None
