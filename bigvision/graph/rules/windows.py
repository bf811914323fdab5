"""Operators that read a window of rows: convolutions, pools, padding, pixel shuffles."""

from __future__ import annotations

from typing import Any

from torch import fx

from bigvision.graph import axes
from bigvision.graph.arguments import (
    convolution_padding,
    pair,
)
from bigvision.graph.axes import AxisMap
from bigvision.graph.layout import Flow, refusal
from bigvision.graph.rules.registry import layout_of, nchw, rule
from bigvision.graph.trace import operator_name, result_shape


@rule(conv2d="input weight bias stride padding dilation groups")
def _convolution(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    if len(before) != 4:
        raise refusal(node, f"its input has the shape {before}, without the axis of the batch")
    kernel = result_shape(args["weight"])[-2:]
    padding = convolution_padding(args, kernel)
    stride, dilation = pair(args["stride"]), pair(args["dilation"])
    rows, cols = (
        axes.window(before[2 + a], after[2 + a], kernel[a], stride[a], dilation[a], padding[a][0])
        for a in (0, 1)
    )
    return Flow(nchw(node, source), rows, cols)


@rule(conv_transpose2d="input weight bias stride padding output_padding groups dilation")
def _transposed_convolution(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    if len(before) != 4:
        raise refusal(node, f"its input has the shape {before}, without the axis of the batch")
    kernel = result_shape(args["weight"])[-2:]
    stride, dilation, padding = pair(args["stride"]), pair(args["dilation"]), pair(args["padding"])
    rows, cols = (
        axes.transposed(before[2 + a], after[2 + a], kernel[a], stride[a], dilation[a], padding[a])
        for a in (0, 1)
    )
    return Flow(nchw(node, source), rows, cols)


@rule(
    max_pool2d="self kernel_size stride padding dilation ceil_mode",
    max_pool2d_with_indices="self kernel_size stride padding dilation ceil_mode",
    avg_pool2d="self kernel_size stride padding ceil_mode count_include_pad divisor_override",
)
def _pool(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["self"]), result_shape(node)
    kernel, padding = pair(args["kernel_size"]), pair(args["padding"])
    stride = pair(args["stride"] or kernel)
    dilation, layout = pair(args.get("dilation", 1)), nchw(node, source)
    if kernel == before[-2:] and padding == (0, 0) and after[-2:] == (1, 1):
        return Flow(None, statistic=True)
    rows, cols = (
        axes.window(before[a - 2], after[a - 2], kernel[a], stride[a], dilation[a], padding[a])
        for a in (0, 1)
    )
    return Flow(layout, rows, cols)


@rule(
    pad="self pad mode value",
    constant_pad_nd="self pad value",
    reflection_pad2d="self padding",
    replication_pad2d="self padding",
)
def _padded(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    before = result_shape(args["self"])
    name = operator_name(node)
    mode = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}.get(
        name, args.get("mode", "constant")
    )
    amounts = args["padding"] if "padding" in args else args["pad"]

    def along(axis: int | None) -> AxisMap | None:
        at = None if axis is None else 2 * (-axis - 1)
        if at is None or at >= len(amounts) or not any(amounts[at : at + 2]):
            return None
        return axes.padded(before[axis], amounts[at], amounts[at + 1], mode)  # type: ignore[index]

    rows = along(layout.rows)
    if rows is not None and mode == "circular":
        raise refusal(node, "circular padding needs the last rows first")
    return Flow(layout, rows, along(layout.cols))


@rule(pixel_shuffle="self upscale_factor")
def _shuffled(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    height, width = result_shape(args["self"])[-2:]
    r = args["upscale_factor"]
    return Flow(nchw(node, source), axes.shuffled(height, r), axes.shuffled(width, r))


@rule(pixel_unshuffle="self downscale_factor")
def _unshuffled(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    height, width = result_shape(args["self"])[-2:]
    r = args["downscale_factor"]
    return Flow(nchw(node, source), axes.unshuffled(height, r), axes.unshuffled(width, r))
