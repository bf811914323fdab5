"""Total stride and exact halo of a network, read off its traced graph.

A tile is computed as the whole image would be when its padded window starts at a multiple of the total stride
(the sampling grids of every layer coincide) and its halo covers every input pixel that its core depends on.

Legend: s total stride, h halo, both in input pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigvision.graph.flow import flows, streaming_inputs
from bigvision.graph.layout import Flow
from bigvision.graph.trace import TracedGraph, describe, result_shape, trace
from bigvision.graph.untouched import untouched

# A size that the strides of all common networks divide; nothing is computed, so it costs nothing.
NOMINAL_SIZE = 1024
# Most networks halve five times; nothing tells before a trace, except where a model runs on a fake image.
LIKELY_STRIDE = 32
_LARGEST_STRIDE = 64  # of what is taken for a layer of pixels rather than a pooled statistic


@dataclass(frozen=True)
class Geometry:
    """What a tiling needs to know of a network.

    Attributes:
        stride: total stride; padded windows start at multiples of it, and the whole image is padded to one.
        halo: input pixels that a core window depends on beyond each of its edges, a multiple of `stride`.
        inexact: why tiles can't equal the whole image, one operator each; empty where they do.
        output_scale: input pixels per output pixel (1 for segmentation; 0 where the output isn't spatial).
    """

    stride: int
    halo: int
    inexact: tuple[str, ...]
    output_scale: Fraction


def padded_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of the whole image once padded below and right to multiples of the total stride."""
    return -(-height // stride) * stride, -(-width // stride) * stride


def trace_padded(
    model: nn.Module, shape: tuple[int, int, int], output: str | int | None = None
) -> tuple[TracedGraph, int]:
    """The graph of the whole image (C, H, W) as it is padded, and the total stride that it is padded to.

    `output` names the one that counts, where the model returns several.
    """
    channels, height, width = shape
    if min(shape) < 1:
        raise ValueError(f"an image's shape is (channels, rows, columns), all positive, not {tuple(shape)}")
    likely = (channels, *padded_size(height, width, _guessed_stride(model, channels)))
    with contextlib.suppress(ValueError):  # it may refuse that size, or be refused at the right one
        traced = trace(model, likely, output)
        stride = total_stride(traced, flows(traced))
        if (channels, *padded_size(height, width, stride)) == likely:
            return traced, stride
    nominal = trace(model, (channels, NOMINAL_SIZE, NOMINAL_SIZE), output)
    stride = total_stride(nominal, flows(nominal))
    return trace(model, (channels, *padded_size(height, width, stride)), output), stride


def _guessed_stride(model: nn.Module, channels: int) -> int:
    """The total stride by the smallest layer of a fake image: cheaper than a trace, and to be checked."""
    if model.training:
        return LIKELY_STRIDE
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    rows = _Rows()
    try:
        with untouched(model), FakeTensorMode(allow_non_fake_inputs=True) as fake, rows, torch.no_grad():
            # Of its own, for the model may change them.
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            own: dict[str, Tensor] = {name: fake.from_tensor(one) for name, one in tensors.items()}
            image = torch.empty(1, channels, NOMINAL_SIZE, NOMINAL_SIZE, dtype=like.dtype, device=like.device)
            torch.func.functional_call(model, own, (image,))
    except Exception:  # whatever a foreign forward raises, tracing it will tell
        return LIKELY_STRIDE
    return round(NOMINAL_SIZE / rows.least)


class _Rows(TorchDispatchMode):
    """Remembers the fewest rows that any map had."""

    def __init__(self) -> None:
        super().__init__()
        self.least = NOMINAL_SIZE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            rows = one.shape[-2] if isinstance(one, Tensor) and one.dim() == 4 and len(one) == 1 else 0
            self.least = min(self.least, rows) if rows >= NOMINAL_SIZE // _LARGEST_STRIDE else self.least
        return result


def geometry(traced: TracedGraph) -> Geometry:
    """Total stride, exact halo and the reasons why tiles can't be exact.

    Raises:
        UnsupportedOperatorError: the graph mixes rows in a way that no rule covers.
    """
    known = flows(traced)
    stride = total_stride(traced, known)
    halo = _halo(traced, known, stride)
    return Geometry(stride, -(-halo // stride) * stride, _inexact(known), _output_scale(traced, known))


def total_stride(traced: TracedGraph, known: dict[fx.Node, Flow]) -> int:
    """The least shift of the image that shifts every layer by a whole number of its own pixels."""
    total = 1
    for axis in ("rows", "cols"):
        scales = _scales(known, axis)
        total = math.lcm(total, *(scale.numerator for scale in scales.values()))
    return total


def _scales(known: dict[fx.Node, Flow], axis: str) -> dict[fx.Node, Fraction]:
    """Input pixels per pixel of every streaming node that depends on the image, along one axis."""
    scales: dict[fx.Node, Fraction] = {}
    for node, flow in known.items():
        if flow.layout is None:
            continue
        if node.op == "placeholder":
            scales[node] = Fraction(1)
            continue
        found = [scales[source] for source in streaming_inputs(node, known) if source in scales]
        if found:
            own = getattr(flow, axis)
            scale = max(found) * (own.scale if own is not None else 1)
            # Sizes that a stride does not divide make ratios such as 342/1024: a third, as far as grids go.
            scales[node] = scale if scale.denominator == 1 else scale.limit_denominator(64)
    return scales


def _inexact(known: dict[fx.Node, Flow]) -> tuple[str, ...]:
    reasons = []
    for node, flow in known.items():
        if flow.statistic:
            reasons.append(f"{describe(node)} needs the whole image")
        elif not flow.local_columns:
            reasons.append(f"{describe(node)} needs whole rows")
        elif any(axis is not None and not axis.uniform for axis in (flow.rows, flow.cols)):
            reasons.append(f"{describe(node)} resamples by a ratio that depends on the image's size")
    return tuple(reasons)


def _halo(traced: TracedGraph, known: dict[fx.Node, Flow], stride: int) -> int:
    """The farthest input pixel, beyond a core window aligned to the stride, that the core depends on."""
    cores = itertools.product(("rows", "cols"), (0, 1, 2))
    return max(_reach(traced, known, axis, position, stride) for axis, position in cores)


def _reach(traced: TracedGraph, known: dict[fx.Node, Flow], axis: str, position: int, stride: int) -> int:
    """How far a core of one stride reads beyond itself, with the core at the start, middle or end."""
    size = traced.shape[1 if axis == "rows" else 2]
    blocks = max(size // stride, 1)
    start = (0, blocks // 2, blocks - 1)[position] * stride
    stop = min(start + stride, size)
    needed: dict[fx.Node, tuple[int, int]] = {}
    layout = known[traced.output].layout
    at = None if layout is None else getattr(layout, axis)
    if at is not None:
        length = result_shape(traced.output)[at]
        first = start * length // size
        _widen(needed, traced.output, (first, max(-(-stop * length // size), first + 1)))
    for node in reversed(list(known)):
        if node not in needed or node is traced.image:
            continue
        own = getattr(known[node], axis)
        span = needed[node] if own is None else own.span(*needed[node])
        for source in streaming_inputs(node, known):
            length = result_shape(source)[getattr(known[source].layout, axis)]
            # Of an operand of one column that all columns read there is no other.
            _widen(needed, source, (min(max(span[0], 0), length - 1), min(span[1], length)))
    if traced.image not in needed:
        return 0
    first, last = needed[traced.image]
    return max(start - first, last - stop, 0)


def _widen(needed: dict[fx.Node, tuple[int, int]], node: fx.Node, span: tuple[int, int]) -> None:
    start, stop = max(span[0], 0), max(span[1], span[0] + 1, 1)
    before = needed.get(node, (start, stop))
    needed[node] = (min(before[0], start), max(before[1], stop))


def _output_scale(traced: TracedGraph, known: dict[fx.Node, Flow]) -> Fraction:
    rows = _scales(known, "rows")
    return rows.get(traced.output, Fraction(0))
