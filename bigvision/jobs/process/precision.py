"""Whether a network may run in bfloat16 on a scene: only where what is written stays what it is in float32.

Legend: C bands, K logits, h and w rows and columns of a region.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.hardware import has_fast_bfloat16
from bigvision.jobs.process.engine import to_strides
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.scene import Scene

Region = tuple[NDArray[np.float32], NDArray[np.bool_]]  # pixels [C, h, w], where they have data [h, w]

_LARGE = 4096  # a scene of this many rows and columns is compared in larger regions
_REGIONS = 4
_CANDIDATES = 4  # a side: regions with the most data are taken from a grid of this many squared


@dataclass(frozen=True)
class Precision:
    """The type chosen. agreement: part of the compared pixels that are alike in both; None: not compared."""

    dtype: str
    agreement: float | None


def choose_precision(
    scene: Scene, spec: NetworkSpec, options: Options, kind: ResultKind, stride: int
) -> Precision:
    """float32, or bfloat16 where asked for or where `auto` finds it quick here and faithful on this scene."""
    if options.dtype != "auto":
        return Precision(options.dtype, None)
    if not has_fast_bfloat16(spec.device):
        return Precision("float32", None)
    regions = regions_of(scene)
    return judged(spec, kind, stride, options, regions) if regions else Precision("float32", None)


def judged(
    spec: NetworkSpec, kind: ResultKind, stride: int, options: Options, regions: list[Region]
) -> Precision:
    """bfloat16 where enough of what is written of `regions` is what it is in float32."""
    agreement = _agreement(spec, kind, regions, stride)
    return Precision("bfloat16" if agreement >= options.min_agreement else "float32", agreement)


def _agreement(spec: NetworkSpec, kind: ResultKind, regions: list[Region], stride: int) -> float:
    try:
        quick = load_network(replace(spec, dtype="bfloat16"))
        return agreement_of(load_network(spec), quick, kind, regions, stride)
    except RuntimeError:  # an operator without a bfloat16 kernel
        return 0.0


def agreement_of(
    exact: Network,
    quick: Network,
    kind: ResultKind,
    regions: list[Region],
    stride: int,
) -> float:
    """The part of the valid pixels of `regions` ([C, h, w], bool [h, w]) for which both write the same."""
    same = total = 0
    for pixels, valid in regions:
        image = to_strides(pixels, stride)
        rows, columns = valid.shape
        one, other = (net(image)[:, :rows, :columns] for net in (exact, quick))
        same += int((kind.alike(one, other).cpu() & torch.from_numpy(valid)).sum())
        total += int(valid.sum())
    return same / total


def regions_of(scene: Scene) -> list[Region]:
    """A few windows with the most data among evenly spread ones; none where all is nodata."""
    frame = scene.frame
    side = 512 if min(frame.height, frame.width) >= _LARGE else 256
    rows, columns = min(side, frame.height), min(side, frame.width)
    windows = [
        Window(frame.col_off + left, frame.row_off + top, columns, rows)
        for top in _starts(frame.height, side)
        for left in _starts(frame.width, side)
    ]
    read = [(pixels, valid & scene.inside(at)) for at in windows for pixels, valid in [scene.read(at)]]
    read.sort(key=lambda region: -int(region[1].sum()))
    return [region for region in read[:_REGIONS] if region[1].any()]


def _starts(size: int, side: int) -> list[int]:
    free = max(size - side, 0)
    return sorted({free * (2 * i + 1) // (2 * _CANDIDATES) for i in range(_CANDIDATES)})
