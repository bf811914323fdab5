"""Total stride and exact halo of a network, read off its traced graph.

A tile is computed as the whole image would be when its padded window starts at a multiple of the total stride
(the sampling grids of every layer coincide) and its halo covers every input pixel that its core depends on.

Legend: s total stride, h halo, both in input pixels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigvision.graph.arguments import INTERPOLATIONS, arguments, resample_factors
from bigvision.graph.axes import AxisMap
from bigvision.graph.flow import flows, streaming_inputs
from bigvision.graph.layout import Flow, UnsupportedOperatorError
from bigvision.graph.outputs import OutputError
from bigvision.graph.rules.resampled import WIDEST_STREAMED_BIN
from bigvision.graph.trace import TracedGraph, describe, operator_name, quiet_torch, result_shape, trace
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

    A network that runs at the asked size only is traced there, padded or not. `output` names the one that
    counts, where the model returns several.

    Raises:
        ValueError: as `trace` has it, of the asked size.
        UnsupportedOperatorError, OutputError: as `total_stride` has them.
    """
    channels, height, width = shape
    if min(shape) < 1:
        raise ValueError(f"an image's shape is (channels, rows, columns), all positive, not {tuple(shape)}")
    guess = _guessed_stride(model, channels)
    sizes = [padded_size(height, width, guess), padded_size(height, width, LIKELY_STRIDE), (height, width)]
    tried: dict[tuple[int, int], tuple[TracedGraph, int] | ValueError] = {}
    while sizes:
        size = sizes.pop(0)
        if size in tried:
            continue
        tried[size] = found = _trace_at(model, (channels, *size), output)
        if isinstance(found, tuple):
            own = padded_size(height, width, found[1])
            if own == size:
                return found
            known = tried.get(own)
            if isinstance(known, tuple):  # maps of one pixel hide a stride there that a larger image shows
                return known[0], found[1]
            sizes.insert(0, own)
    return _least_bad(tried, (height, width))


def _trace_at(
    model: nn.Module, shape: tuple[int, int, int], output: str | int | None
) -> tuple[TracedGraph, int] | ValueError:
    """The graph at one size and the total stride that it tells, or why there is none."""
    try:
        traced = trace(model, shape, output)
        return traced, total_stride(traced, flows(traced))
    except ValueError as error:
        return error


def _least_bad(
    tried: dict[tuple[int, int], tuple[TracedGraph, int] | ValueError], asked: tuple[int, int]
) -> tuple[TracedGraph, int]:
    """Where no padded size will do: the asked size itself, or the best reason why not.

    A network that runs at one size (position embeddings, fixed grids) is traced at it, though no multiple of
    its stride. Reasons that name an operator or an output hold at any size; others are told of the asked one.
    """
    own = tried[asked]
    if isinstance(own, tuple):
        return own
    named = [one for one in tried.values() if isinstance(one, UnsupportedOperatorError | OutputError)]
    raise own if isinstance(own, UnsupportedOperatorError | OutputError) or not named else named[0]


def _guessed_stride(model: nn.Module, channels: int) -> int:
    """The total stride by the smallest layer of a fake image: cheaper than a trace, and to be checked."""
    if model.training:
        return LIKELY_STRIDE
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    rows = _Rows()
    try:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with quiet_torch(), untouched(model), fakes as fake, rows, torch.no_grad():
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
    """The least shift of the image that shifts every subsampled layer by a whole number of its own pixels.

    Bins of adaptive and whole-map pools lie where the map's size puts them and ask for no stride.
    """
    total = 1
    for axis in ("rows", "cols"):
        scales = _scales(known, axis, of_bins=False)
        total = math.lcm(total, *(scale.numerator for scale in scales.values()))
    return total


def _scales(known: dict[fx.Node, Flow], axis: str, *, of_bins: bool = True) -> dict[fx.Node, Fraction]:
    """Input pixels per pixel of every streaming node that depends on the image, along one axis.

    Without `of_bins` what is computed of bins alone has none.
    """
    scales: dict[fx.Node, Fraction] = {}
    for node, flow in known.items():
        if flow.layout is None:
            continue
        if node.op == "placeholder":
            scales[node] = Fraction(1)
            continue
        found = [scales[source] for source in streaming_inputs(node, known) if source in scales]
        own = getattr(flow, axis)
        if found and (of_bins or own is None or not _is_binned(node, own)):
            scale = max(found) * (1 if own is None else _step(node, own, axis))
            # Sizes that a stride does not divide make ratios such as 342/1024: a third, as far as grids go.
            scales[node] = scale if scale.denominator == 1 else scale.limit_denominator(64)
    return scales


def _is_binned(node: fx.Node, own: AxisMap) -> bool:
    """Whether an operator's rows are bins of the whole map, as many whatever its size."""
    name = operator_name(node)
    if "adaptive" in name:
        return own.size_in != own.size_out
    return "pool" in name and own.size_out == 1 and own.size_in > WIDEST_STREAMED_BIN


def _step(node: fx.Node, own: AxisMap, axis: str) -> Fraction:
    """Rows of the input per row of the result; of a resampled map by the factor that is meant."""
    if operator_name(node) not in INTERPOLATIONS:
        return own.scale
    factor = resample_factors(arguments(node))[axis == "cols"]
    if factor:
        return Fraction(1 / factor).limit_denominator(64)
    if own.size_out >= own.size_in:  # 9 rows to 17 double a map that was halved
        return Fraction(1, round(own.size_out / own.size_in))
    return own.scale if own.scale.denominator == 1 else Fraction(1)


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
