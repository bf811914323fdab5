"""One arithmetic for all scenes of a command: neighbouring tiles of a mosaic are computed alike."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigvision.hardware import has_fast_bfloat16
from bigvision.jobs.process.geometry import analyse
from bigvision.jobs.process.network import load_network, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.precision import Precision, Region, judged, regions_of
from bigvision.jobs.process.provenance import TAG, provenance
from bigvision.jobs.process.scene import open_scene
from tiling import open_raster

_SCENES = 4  # of a batch that are looked at, evenly spread
_REGIONS = 2  # of each
Batch = Sequence[tuple[tuple[str, ...], Path]]


def precision_of(batch: Batch, options: Options) -> Precision | None:
    """What `--dtype auto` comes to for all scenes of a command; None where each says it for itself.

    What an earlier run of the same command chose, whose results are at hand, is kept.
    """
    if options.dtype != "auto" or options.route is not None or len(batch) < 2:
        return None
    if not has_fast_bfloat16(network_spec(options, channels=1).device):
        return None
    kept = next(_kept(batch, options), None)
    return Precision(kept, None) if kept else _judged(batch, options)


def _kept(batch: Batch, options: Options) -> Iterator[str]:
    """The types of results, finished and unfinished, that this very command made of scenes of the batch."""
    for paths, target in batch:
        run = target.with_name(f".{target.name}.run") / "run.json"
        if not (target.exists() or run.exists()):
            continue
        try:
            scene = open_scene(paths, options)
            network = load_network(network_spec(options, scene.shape[0], scene=scene.shape[1:]))
            mine = provenance(paths, options, network, scene.shape).fingerprint
            if target.exists() and (tags := open_raster(target).tags).get(TAG) == mine:
                yield tags["BIGVISION_DTYPE"]
            elif run.exists() and (record := json.loads(run.read_text()))["fingerprint"] == mine:
                yield record["plan"]["dtype"]
        except Exception:  # whatever is wrong with a scene or a result, its own turn tells
            continue


def _judged(batch: Batch, options: Options) -> Precision | None:
    """By regions of several scenes; None where none of them can be read."""
    step = max(1, len(batch) // _SCENES)
    found: list[Region] = []
    chosen = None
    for paths, _ in batch[::step][:_SCENES]:
        try:
            scene = open_scene(paths, options)
            spec = network_spec(options, scene.shape[0], scene=scene.shape[1:])
            network = load_network(spec)
            chosen = chosen or (
                spec,
                network.nature.result(options),
                analyse(network.module, scene.shape).stride,
            )
            found += regions_of(scene)[:_REGIONS] if spec == chosen[0] else []
        except Exception:  # its own turn tells
            continue
    return None if chosen is None or not found else judged(*chosen, options, found)
