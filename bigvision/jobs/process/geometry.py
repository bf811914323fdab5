"""What a tiling must know of a network at a scene's size: read off its graph, or probed where it has none.

Legend: C bands, H and W rows and columns of the scene.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from bigvision.graph.cost import cost
from bigvision.graph.geometry import NOMINAL_SIZE, geometry, trace_padded
from bigvision.graph.probe import probe
from bigvision.graph.trace import TracedGraph, UntraceableError, trace
from bigvision.jobs.process.allocation import peak_bytes
from bigvision.models.identity import graph_hash

_SAMPLE = 256  # rows and columns of the image that memory is estimated on


@dataclass(frozen=True)
class Analysis:
    """A network's geometry, and the bytes of activations alive at once for one pixel in float32.

    inexact: why tiles can't equal the whole image; empty where they can. source: "graph" or "probe".
    graph: hash of what is computed, "" where that can't be written down.
    """

    stride: int
    halo: int
    inexact: tuple[str, ...]
    bytes_per_pixel: float
    parameter_bytes: int
    source: str
    graph: str = ""


@lru_cache(maxsize=16)
def analyse(model: nn.Module, shape: tuple[int, int, int]) -> Analysis:
    """Stride, exact halo and memory of `model` over a scene [C, H, W]; ValueError names what has no rule."""
    try:
        return _of_graph(model, *trace_padded(model, shape))
    except UntraceableError:
        return _of_probe(model, shape[0])


@lru_cache(maxsize=4)
def graph_of(model: nn.Module, channels: int) -> str:
    """Hash of what `model` computes on an image of nominal size; "" where that can't be written down."""
    try:
        return graph_hash(trace(model, (channels, NOMINAL_SIZE, NOMINAL_SIZE)), model)
    except ValueError:
        return ""


def _of_graph(model: nn.Module, traced: TracedGraph, stride: int) -> Analysis:
    known, (_, height, width) = geometry(traced), traced.shape
    alive = cost(traced).dense_peak_bytes / (height * width)
    return Analysis(
        stride, known.halo, known.inexact, alive, _weight_bytes(model), "graph", graph_hash(traced, model)
    )


@lru_cache(maxsize=4)
def _of_probe(model: nn.Module, channels: int) -> Analysis:
    found = probe(model, channels)
    alive = peak_bytes(model, torch.zeros(1, channels, _SAMPLE, _SAMPLE)) / _SAMPLE**2
    return Analysis(found.stride, found.halo, found.inexact, alive, _weight_bytes(model), "probe")


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
