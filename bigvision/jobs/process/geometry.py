"""What a tiling must know of a network at a scene's size: read off its graph, or probed where it has none.

Legend: C bands, H and W rows and columns of the scene.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from bigvision.graph.cost import cost
from bigvision.graph.flow import flows
from bigvision.graph.geometry import NOMINAL_SIZE, geometry, padded_size, total_stride
from bigvision.graph.probe import probe
from bigvision.graph.trace import UntraceableError, trace
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


def analyse(model: nn.Module, shape: tuple[int, int, int]) -> Analysis:
    """Stride, exact halo and memory of `model` over a scene [C, H, W]; ValueError names what has no rule."""
    channels, height, width = shape
    try:
        stride = _stride(model, channels)
        return _of_graph(model, (channels, *padded_size(height, width, stride)), stride)
    except UntraceableError:
        return _of_probe(model, channels)


@lru_cache(maxsize=4)
def graph_of(model: nn.Module, channels: int) -> str:
    """Hash of what `model` computes on an image of nominal size; "" where that can't be written down."""
    try:
        return graph_hash(trace(model, (channels, NOMINAL_SIZE, NOMINAL_SIZE)), model)
    except ValueError:
        return ""


@lru_cache(maxsize=4)
def _stride(model: nn.Module, channels: int) -> int:
    """The total stride, which no size of an image changes."""
    nominal = trace(model, (channels, NOMINAL_SIZE, NOMINAL_SIZE))
    return total_stride(nominal, flows(nominal))


@lru_cache(maxsize=16)
def _of_graph(model: nn.Module, padded: tuple[int, int, int], stride: int) -> Analysis:
    traced = trace(model, padded)
    known = geometry(traced)
    alive = cost(traced).dense_peak_bytes / (padded[1] * padded[2])
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
