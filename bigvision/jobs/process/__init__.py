"""A trained network over georeferenced scenes of any size: `bigvision process`."""

from bigvision.jobs.process.job import process_scenes
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.run import Outcome, run_scene

__all__ = ["Options", "Outcome", "process_scenes", "run_scene"]
