"""Row kernels: one operator applied to some rows of an image as if to the whole of it.

A kernel gets the rows that its output rows read (fewer at the image's edges, where it adds the operator's own
padding) and gives exactly those output rows. All kernels are differentiable and keep nothing between calls.

Legend: a, b first and past-the-last output row; first, last the same of the input rows they read, which lie
outside 0..size_in where the operator pads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from bigvision.graph.arguments import (
    INTERPOLATIONS,
    arguments,
    convolution_padding,
    pad_mode,
    pair,
    resample_factors,
)
from bigvision.graph.axes import AxisMap
from bigvision.graph.layout import Flow
from bigvision.graph.resampling import Taps, area_taps, interpolate_columns, interpolation_taps, resample_rows
from bigvision.graph.trace import operator_name, result_shape
from bigvision.streaming.convolution import Convolve, convolve

Values = Callable[[fx.Node], Any]
"""Gives a kernel its inputs: a streaming one's rows first..last, clipped to the image; a held one whole."""

Kernel = Callable[[Values, "Span"], Any]
"""Gives an operator's rows; several results are a tuple, also where ATen gives a list (chunk, unbind)."""


@dataclass(frozen=True)
class Span:
    """Output rows a..b and the input rows first..last that they read."""

    a: int
    b: int
    first: int
    last: int
    size_in: int

    @property
    def above(self) -> int:
        """Padding rows that the window reads above the image."""
        return max(0, min(self.last, 0) - self.first)

    @property
    def below(self) -> int:
        """Padding rows that the window reads below the image."""
        return max(0, self.last - max(self.size_in, self.first))

    @property
    def read(self) -> tuple[int, int]:
        """The input rows that exist."""
        start = min(max(self.first, 0), self.size_in)
        return start, max(min(self.last, self.size_in), start)


def span_of(rows: AxisMap | None, size_in: int, a: int, b: int) -> Span:
    """What output rows a..b read through the map `rows` (None: the same rows)."""
    first, last = (a, b) if rows is None else rows.span(a, b)
    return Span(a, b, first, last, size_in)


def kernel_for(node: fx.Node, flow: Flow) -> Kernel:
    """The row kernel of an operator whose flow is known."""
    maker = _MAKERS.get(operator_name(node))
    return maker(node, flow) if maker else _as_it_is(node)


def _as_it_is(node: fx.Node) -> Kernel:
    """Operators that treat every row alike run on rows unchanged."""

    def run(values: Values, span: Span) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(result) if isinstance(result, list) else result

    return run


def _sized(node: fx.Node, flow: Flow) -> Kernel:
    """Views and expansions name the number of rows; here it is the number at hand."""
    source = arguments(node)["self"]
    assert flow.layout is not None
    shape, axis = list(result_shape(node)), flow.layout.rows

    def run(values: Values, span: Span) -> Tensor:
        here = [*shape]
        here[axis] = span.b - span.a
        x = values(source)
        return x.expand(here) if operator_name(node) == "expand" else x.reshape(here)

    return run


def _norm_by_running_statistics(node: fx.Node, flow: Flow) -> Kernel:
    """Batch norm and, which is the same then, instance norm (whose own kernel copies the statistics)."""
    args = arguments(node)
    eps, several = args["eps"], operator_name(node) == "_native_batch_norm_legit_no_training"

    def run(values: Values, span: Span) -> Tensor | tuple[Tensor]:
        mean, variance = values(args["running_mean"]), values(args["running_var"])
        weight, bias = (None if args[name] is None else values(args[name]) for name in ("weight", "bias"))
        y = F.batch_norm(values(args["input"]), mean, variance, weight, bias, False, 0.0, eps)
        return (y,) if several else y

    return run


def convolution(node: fx.Node, apply: Convolve = convolve) -> Kernel:
    """The row kernel of a convolution, computed by `apply`."""
    args = arguments(node)
    kernel, width = result_shape(args["weight"])[-2:], result_shape(args["input"])[-1]
    left, right = convolution_padding(args, kernel)[1]
    stride, dilation, groups = pair(args["stride"]), pair(args["dilation"]), args["groups"]

    def run(values: Values, span: Span) -> Tensor:
        x, cols = values(args["input"]), left
        if x.shape[-1] > width:  # its padding stands beside the rows already
            cols = 0
        elif left != right:
            x, cols = F.pad(x, (left, right)), 0
        x = pad_rows(x, span)
        bias = None if args["bias"] is None else values(args["bias"])
        return apply(x, values(args["weight"]), bias, stride, (0, cols), dilation, groups)

    return run


def _transposed_convolution(node: fx.Node, flow: Flow) -> Kernel:
    args = arguments(node)
    kernel = result_shape(args["weight"])[-2]
    (stride, _), (dilation, _) = pair(args["stride"]), pair(args["dilation"])
    padding, output_padding = pair(args["padding"]), pair(args["output_padding"])

    def run(values: Values, span: Span) -> Tensor:
        x = values(args["input"])
        # Result rows that no input row reaches need rows of zeros on either side of those that exist.
        start = min(span.read[0], (span.a + padding[0]) // stride)
        reach = span.b + padding[0] - start * stride  # rows of the unpadded result that are wanted
        above = span.read[0] - start
        missing = max(-(-(reach - (kernel - 1) * dilation - 1) // stride) + 1, 1) - above - x.shape[-2]
        x = F.pad(x, (0, 0, above, max(missing, 0)))
        bias = None if args["bias"] is None else values(args["bias"])
        y = F.conv_transpose2d(
            x,
            values(args["weight"]),
            bias,
            args["stride"],
            (0, padding[1]),
            (0, output_padding[1]),
            args["groups"],
            args["dilation"],
        )
        return y.narrow(-2, span.a + padding[0] - start * stride, span.b - span.a)

    return run


def _max_pool(node: fx.Node, flow: Flow) -> Kernel:
    source, pooled = arguments(node)["self"], max_pool(node)
    wrap = operator_name(node) == "max_pool2d_with_indices"

    def run(values: Values, span: Span) -> Any:
        y = F.max_pool2d(pad_rows(values(source), span, -torch.inf), *pooled)
        return (y,) if wrap else y

    return run


def max_pool(node: fx.Node) -> tuple[Any, ...]:
    """Kernel, stride, padding, dilation and ceil_mode of a pool over rows that have their padding."""
    args = arguments(node)
    kernel, padding = args["kernel_size"], (0, pair(args["padding"])[1])
    return kernel, args["stride"] or kernel, padding, args["dilation"], args["ceil_mode"]


def _average_pool(node: fx.Node, flow: Flow) -> Kernel:
    args = arguments(node)
    kernel, padding = pair(args["kernel_size"]), pair(args["padding"])
    stride = pair(args["stride"] or kernel)
    before, after = result_shape(args["self"])[-2:], result_shape(node)[-2:]
    right = (after[1] - 1) * stride[1] + kernel[1] - padding[1] - before[1]
    counts = [_window_counts(args, before[a], after[a], kernel[a], stride[a], padding[a]) for a in (0, 1)]

    def run(values: Values, span: Span) -> Tensor:
        x = F.pad(pad_rows(values(args["self"]), span), (padding[1], right))
        sums = F.avg_pool2d(x, kernel, stride, divisor_override=1)
        if args["divisor_override"]:
            return sums / args["divisor_override"]
        rows, cols = (torch.from_numpy(count).to(x) for count in (counts[0][span.a : span.b], counts[1]))
        return sums / (rows[:, None] * cols)

    return run


def _window_counts(args: dict[str, Any], n_in: int, n_out: int, k: int, s: int, p: int) -> np.ndarray:
    """How many rows each window of an average pool is divided by, as ATen counts them."""
    start = np.arange(n_out) * s - p
    stop = np.minimum(start + k, n_in + p)
    if args["count_include_pad"]:
        return stop - start
    return np.minimum(stop, n_in) - np.maximum(start, 0)


def _pad(node: fx.Node, flow: Flow) -> Kernel:
    args = arguments(node)
    amounts = list(args["padding"] if "padding" in args else args["pad"])
    mode = pad_mode(operator_name(node), args)
    assert flow.layout is not None
    at = 2 * (-flow.layout.rows - 1)
    top = amounts[at] if flow.rows is not None else 0
    if at < len(amounts):
        amounts[at : at + 2] = [0, 0]
    value = args.get("value") or 0.0
    axis = flow.layout.rows

    def run(values: Values, span: Span) -> Tensor:
        x = values(args["self"])
        x = F.pad(x, amounts, mode, value) if any(amounts) else x
        if flow.rows is None:
            return x
        if mode == "constant":
            return F.pad(x, [0] * at + [span.above, span.below], "constant", value)
        rows = torch.arange(span.a - top, span.b - top)
        last = span.size_in - 1
        folded = rows.abs() if mode == "reflect" else rows.clamp(min=0)
        folded = torch.where(rows > last, 2 * last - rows if mode == "reflect" else last, folded)
        return x.index_select(axis, (folded - span.read[0]).to(x.device))

    return run


def _pixel_shuffle(node: fx.Node, flow: Flow) -> Kernel:
    args = arguments(node)
    r = args["upscale_factor"]

    def run(values: Values, span: Span) -> Tensor:
        y = F.pixel_shuffle(values(args["self"]), r)
        return y.narrow(-2, span.a - span.first * r, span.b - span.a)

    return run


def _slice(node: fx.Node, flow: Flow) -> Kernel:
    if flow.rows is None:
        return _as_it_is(node)
    args = arguments(node)
    assert flow.layout is not None
    cut = (Ellipsis, slice(None, None, args["step"]), *[slice(None)] * (-flow.layout.rows - 1))

    def run(values: Values, span: Span) -> Tensor:
        return values(args["self"])[cut]

    return run


def _interpolation(node: fx.Node, flow: Flow) -> Kernel:
    args = arguments(node)
    source = args["input"]
    before, after = result_shape(source)[-2:], result_shape(node)[-2:]
    kind, factors = INTERPOLATIONS[operator_name(node)], resample_factors(args)
    align_corners = args.get("align_corners", False)
    whole = _whole_factors(node)
    if whole is not None and not align_corners and kind != "bicubic":
        return _magnification(node, source, whole)
    dtype = node.meta["val"].dtype
    taps = [
        interpolation_taps(kind, n, m, align_corners=align_corners, factor=factor, dtype=dtype)
        for n, m, factor in zip(before, after, factors, strict=True)
    ]
    return _by_taps(source, taps, lambda x: interpolate_columns(x, after[1], kind, align_corners, factors[1]))


def repeats(node: fx.Node) -> tuple[int, int] | None:
    """How often nearest upsampling repeats every row and column; None for anything else."""
    nearest = INTERPOLATIONS.get(operator_name(node)) in ("nearest", "nearest_exact")
    return _whole_factors(node) if nearest else None


def _whole_factors(node: fx.Node) -> tuple[int, int] | None:
    """The whole numbers by which rows and columns grow, or None."""
    args = arguments(node)
    sizes = zip(result_shape(args["input"])[-2:], result_shape(node)[-2:], strict=True)
    rows, cols = (
        after // before if after % before == 0 and factor in (None, after // before) else 0
        for (before, after), factor in zip(sizes, resample_factors(args), strict=True)
    )
    return (rows, cols) if rows and cols else None


def _magnification(node: fx.Node, source: fx.Node, factor: tuple[int, int]) -> Kernel:
    """By a whole factor, the same taps recur row after row: the operator's own kernel, cropped, is exact."""
    name = operator_name(node)

    def run(values: Values, span: Span) -> Tensor:
        x = values(source)
        size = [x.shape[-2] * factor[0], x.shape[-1] * factor[1]]
        operator = getattr(torch.ops.aten, name)
        y = operator(x, size, False) if name == "upsample_bilinear2d" else operator(x, size)
        return y.narrow(-2, span.a - span.read[0] * factor[0], span.b - span.a)

    return run


def _area(node: fx.Node, flow: Flow) -> Kernel:
    source = arguments(node)["self"]
    before, after = result_shape(source)[-2:], result_shape(node)[-2:]
    taps = [area_taps(n, m) for n, m in zip(before, after, strict=True)]
    return _by_taps(
        source, taps, lambda x: interpolate_columns(x, after[1], "area", False, None), skip_zeros=True
    )


def _by_taps(
    source: fx.Node, taps: list[Taps], columns: Callable[[Tensor], Tensor], skip_zeros: bool = False
) -> Kernel:
    """Rows by their taps, then `columns` by the operator's own kernel, which reads the row below, times 0.

    Where that isn't finite, columns go by their taps as well, so that NaN does not spread.
    """

    def run(values: Values, span: Span) -> Tensor:
        x = values(source)
        here = Taps(taps[0].index[span.a : span.b], taps[0].weight[span.a : span.b])
        wide = x if x.dtype == torch.float64 else x.float()  # one rounding at the end, as the operator does
        if is_finite(wide):
            return columns(resample_rows(wide, here, -2, span.read[0])).to(x.dtype)
        rows = resample_rows(wide, here, -2, span.read[0], skip_zeros=skip_zeros)
        return resample_rows(rows, taps[1], -1, 0, skip_zeros=skip_zeros).to(x.dtype)

    return run


def is_finite(x: Tensor) -> bool:
    """Whether its sum is: no, in doubt. A tensor without memory has nothing that isn't."""
    return x.is_meta or bool(torch.isfinite(x.detach().sum()))


def pad_rows(x: Tensor, span: Span, value: float = 0.0) -> Tensor:
    """The rows with those that their window reads above and below the image."""
    if not span.above and not span.below:
        return x
    return F.pad(x, (0, 0, span.above, span.below), value=value)


_MAKERS: dict[str, Callable[[fx.Node, Flow], Kernel]] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "unsqueeze", "squeeze"), _sized),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), _max_pool),
    **dict.fromkeys(INTERPOLATIONS, _interpolation),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _area),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "instance_norm"), _norm_by_running_statistics),
    "conv2d": lambda node, flow: convolution(node),
    "conv_transpose2d": _transposed_convolution,
    "avg_pool2d": _average_pool,
    "pixel_shuffle": _pixel_shuffle,
    "slice": _slice,
}
