"""What a tiling must know of a network at a scene's size: read off its graph, or probed where it has none.

Legend: C bands, H and W rows and columns of the scene.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bigvision.graph.cost import cost
from bigvision.graph.geometry import geometry, padded_size, trace_padded
from bigvision.graph.probe import probe
from bigvision.graph.trace import UntraceableError, trace
from bigvision.jobs.process.allocation import peak_bytes

_SAMPLE = 256  # rows and columns of the image that memory is estimated on


@dataclass(frozen=True)
class Analysis:
    """A network's geometry, and the bytes of activations alive at once for one pixel in float32.

    inexact: why tiles can't equal the whole image; empty where they can. source: "graph" or "probe".
    """

    stride: int
    halo: int
    inexact: tuple[str, ...]
    bytes_per_pixel: float
    parameter_bytes: int
    source: str


def analyse(model: nn.Module, shape: tuple[int, int, int]) -> Analysis:
    """Stride, exact halo and memory of `model` over a scene [C, H, W]; ValueError names what has no rule."""
    channels = shape[0]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        traced, stride = trace_padded(model, shape)
    except UntraceableError:
        found = probe(model, channels)
        image = torch.zeros(1, channels, _SAMPLE, _SAMPLE)
        alive = peak_bytes(model, image) / _SAMPLE**2
        return Analysis(found.stride, found.halo, found.inexact, alive, weights, "probe")
    known = geometry(traced)
    side = padded_size(_SAMPLE, _SAMPLE, stride)
    sample = cost(trace(model, (channels, *side)))
    alive = sample.dense_peak_bytes / (side[0] * side[1])
    return Analysis(stride, known.halo, known.inexact, alive, weights, "graph")
