"""How rows flow through every operator: which of its input rows a row of its result depends on.

A value either *streams* (it has an axis of rows that follows the image's) or is *held* whole (a weight, a
global statistic and what is computed from it). One rule a family of operators says which of the two its
result is, where its rows lie, and what they read. An operator without a rule is refused by name and path.

Legend: rows and columns are named by negative axes, so that [1, C, H, W] has rows -2 and columns -1, and
[1, H, W, C] rows -3 and columns -2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bigvision.graph import axes
from bigvision.graph.axes import AxisMap
from bigvision.graph.resampling import area_taps, interpolation_taps
from bigvision.graph.trace import TracedGraph, describe, operator_name, result_shape


class UnsupportedOperatorError(ValueError):
    """An operator that no row rule covers; the message names it and its module path."""


@dataclass(frozen=True)
class Layout:
    """Where a streaming value keeps its rows and its columns (None: columns were merged or reduced away)."""

    rows: int = -2
    cols: int | None = -1


@dataclass(frozen=True, eq=False)
class Flow:
    """How one operator's result depends on its streaming inputs.

    Attributes:
        layout: where the result's rows lie; None where it is held whole.
        rows, cols: what each row and column reads; None: the same one.
        statistic: the operator needs the whole image before it can give anything (a reduction, or a
            normalisation by moments over the image).
        local_columns: false where a result depends on whole rows of its input, so that no tile can be exact.
    """

    layout: Layout | None
    rows: AxisMap | None = None
    cols: AxisMap | None = None
    statistic: bool = False
    local_columns: bool = True


HELD = Flow(None)
Rule = Callable[[fx.Node, dict[str, Any], Flow], Flow]
RULES: dict[str, Rule] = {}

# Rows per bin up to which adaptive pooling is a sliding window (area resampling); above, it is a statistic.
WIDEST_STREAMED_BIN = 16


def flows(traced: TracedGraph) -> dict[fx.Node, Flow]:
    """The flow of every node of the graph.

    Raises:
        UnsupportedOperatorError: an operator that mixes rows in a way no rule covers, such as attention over
            pixels.
    """
    found: dict[fx.Node, Flow] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            continue
        found[node] = Flow(Layout()) if node is traced.image else _flow(node, found)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by their schema names, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return values | node.kwargs


def streaming_inputs(node: fx.Node, known: dict[fx.Node, Flow]) -> list[fx.Node]:
    """The inputs that stream, each once."""
    return [source for source in node.all_input_nodes if known[source].layout is not None]


def _flow(node: fx.Node, known: dict[fx.Node, Flow]) -> Flow:
    if node.op != "call_function":
        return HELD
    if node.target is operator.getitem:
        return replace(known[node.args[0]], rows=None, cols=None, statistic=False)  # type: ignore[index]
    streamed = streaming_inputs(node, known)
    name = operator_name(node)
    if not streamed:
        return _grown(node, name)
    rule = RULES.get(name) or (_pointwise if _is_pointwise(node) else None)
    if rule is None:
        raise refusal(node, "it has no rule for rows")
    layouts = {known[source].layout for source in streamed}
    if len(layouts) > 1:
        raise refusal(node, f"its inputs keep their rows on different axes: {sorted(map(str, layouts))}")
    return rule(node, arguments(node), known[streamed[0]])


def refusal(node: fx.Node, why: str) -> UnsupportedOperatorError:
    """One sentence that names the operator, its module and a way out."""
    return UnsupportedOperatorError(
        f"{describe(node)} can't be computed row by row: {why}. Use the tile engine with an approximate "
        "halo, or replace that module."
    )


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _grown(node: fx.Node, name: str) -> Flow:
    """A held value that is spread over the image (global pooling's way back) streams from then on."""
    spreads = name.startswith(("upsample_", "_upsample_")) or name == "expand"
    if not spreads or len(result_shape(node)) != 4:
        return HELD
    before, after = result_shape(node.all_input_nodes[0])[-2], result_shape(node)[-2]
    if after <= before:
        return HELD
    if name == "expand":
        return Flow(Layout())
    return RULES[name](node, arguments(node), Flow(Layout()))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _layout(flow: Flow) -> Layout:
    assert flow.layout is not None
    return flow.layout


def _moved(rows: int | None, cols: int | None) -> Layout:
    assert rows is not None
    return Layout(rows, cols)


# --- operators whose row i reads row i


@rule(
    "hardswish",
    "log_sigmoid",
    "prelu",
    "rsub",
    "masked_fill",
    "_to_copy",
    "to",
    "contiguous",
    "clone",
    "alias",
)
@rule(
    "dropout", "native_dropout", "detach", "lift_fresh_copy", "type_as", "relu6", "feature_dropout", "rrelu"
)
@rule(
    "_native_batch_norm_legit_no_training", "batch_norm", "where", "channel_shuffle", "native_channel_shuffle"
)
def _pointwise(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    value = node.meta["val"]
    if not isinstance(value, list | tuple) and value.ndim > _widest_input(node):
        raise refusal(node, "it broadcasts rows against another axis")
    return Flow(layout)


def _widest_input(node: fx.Node) -> int:
    return max(len(result_shape(source)) for source in node.all_input_nodes)


@rule("cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "softmax", "_softmax", "log_softmax")
@rule("_log_softmax", "cumsum", "glu", "flip", "softmin")
def _along_an_axis(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    name = operator_name(node)
    ndim = len(result_shape(node.all_input_nodes[0]))
    given = args["dims"] if name == "flip" else [args["dim"]]
    new_axis = 1 if name == "stack" else 0
    along = {dim if dim < 0 else dim - ndim - new_axis for dim in given}
    if name == "stack":  # a new axis at or behind the rows pushes them to the left
        (axis,) = along
        return Flow(_moved(_pushed(layout.rows, axis), _pushed(layout.cols, axis)))
    if layout.rows in along:
        raise refusal(node, "it works along the rows")
    if name == "unbind":
        (axis,) = along
        return Flow(_moved(_pulled(layout.rows, axis), _pulled(layout.cols, axis)))
    return Flow(layout, local_columns=layout.cols not in along)


def _pushed(position: int | None, axis: int) -> int | None:
    """A negative axis after a new one was inserted at the negative `axis` of the result."""
    return None if position is None else position if axis < position else position - 1


def _pulled(position: int | None, axis: int) -> int | None:
    """A negative axis after the negative `axis` was taken out."""
    return None if position is None else position if axis < position else position + 1


@rule("linear", "layer_norm", "native_layer_norm", "rms_norm")
def _over_the_last_axes(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    count = len(args["normalized_shape"]) if "normalized_shape" in args else 1
    if layout.rows >= -count:
        raise refusal(node, "it mixes rows (GroupNorm(1, C) normalises over channels and space by phases)")
    return Flow(layout, local_columns=layout.cols is None or layout.cols < -count)


@rule("matmul")
def _matmul(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    left, right = args["self"], args["other"]
    layout = _layout(source)
    held_right = len(result_shape(right)) <= 2 and result_shape(left) != result_shape(right)
    if not held_right or layout.rows == -1:
        raise refusal(node, "it is attention over pixels")
    return Flow(layout, local_columns=layout.cols != -1)


@rule("bmm", "einsum", "baddbmm", "scaled_dot_product_attention")
def _attention(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    raise refusal(node, "it is attention over pixels")


# --- operators that move axes


@rule("permute", "transpose", "t", "movedim")
def _permuted(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    ndim = len(result_shape(node))
    if "dims" in args:
        order = [dim % ndim for dim in args["dims"]]
    else:
        order = list(range(ndim))
        a, b = args.get("dim0", 0) % ndim, args.get("dim1", 1) % ndim
        order[a], order[b] = order[b], order[a]

    def moved(position: int | None) -> int | None:
        return None if position is None else order.index(position + ndim) - ndim

    return Flow(_moved(moved(layout.rows), moved(layout.cols)))


@rule("unsqueeze", "squeeze")
def _squeezed(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    return _viewed(node, args, source)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _viewed(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    before, after = result_shape(args["self"]), result_shape(node)
    rows = _carried(before, after, layout.rows)
    if rows is None:
        raise refusal(node, f"its view from {before} to {after} merges rows with another axis")
    cols = None if layout.cols is None else _carried(before, after, layout.cols)
    return Flow(Layout(rows, cols), local_columns=cols is not None)


def _carried(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The axis of `after` that is exactly axis `axis` of `before`, if there is one."""
    inner, size = math.prod(before[len(before) + axis + 1 :]), before[axis]
    return next(
        (
            q
            for q in range(-1, -len(after) - 1, -1)
            if after[q] == size and math.prod(after[len(after) + q + 1 :]) == inner
        ),
        None,
    )


@rule("expand")
def _expanded(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    return Flow(source.layout)


@rule("select")
def _selected(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    axis = _negative(args["dim"], result_shape(args["self"]))
    if axis == layout.rows:
        raise refusal(node, "it picks one row of the image")
    rows = _pulled(layout.rows, axis)
    assert rows is not None
    return Flow(
        Layout(rows, None if axis == layout.cols else _pulled(layout.cols, axis)),
        local_columns=axis != layout.cols,
    )


@rule("slice")
def _sliced(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    before, after = result_shape(args["self"]), result_shape(node)
    axis = _negative(args["dim"], before)
    if axis not in (layout.rows, layout.cols):
        return Flow(layout)
    start = args["start"] or 0
    start = max(start + before[axis], 0) if start < 0 else min(start, before[axis])
    kept = axes.sliced(before[axis], start, args["step"], after[axis])
    return Flow(layout, rows=kept) if axis == layout.rows else Flow(layout, cols=kept)


def _negative(dim: int, shape: tuple[int, ...]) -> int:
    return dim if dim < 0 else dim - len(shape)


# --- windows


def pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of an argument that may be given once for both."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def convolution_padding(
    args: dict[str, Any], kernel: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) for rows and for columns; "same" pads the odd one behind, as ATen does."""
    padding = args["padding"]
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, pair(args["dilation"]), strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    rows, cols = pair(padding)
    return (rows, rows), (cols, cols)


@rule("conv2d")
def _convolution(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    kernel = result_shape(args["weight"])[-2:]
    padding = convolution_padding(args, kernel)
    stride, dilation = pair(args["stride"]), pair(args["dilation"])
    rows, cols = (
        axes.window(before[2 + a], after[2 + a], kernel[a], stride[a], dilation[a], padding[a][0])
        for a in (0, 1)
    )
    return Flow(_nchw(node, source), rows, cols)


@rule("conv_transpose2d")
def _transposed_convolution(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    kernel = result_shape(args["weight"])[-2:]
    stride, dilation, padding = pair(args["stride"]), pair(args["dilation"]), pair(args["padding"])
    rows, cols = (
        axes.transposed(before[2 + a], after[2 + a], kernel[a], stride[a], dilation[a], padding[a])
        for a in (0, 1)
    )
    return Flow(_nchw(node, source), rows, cols)


@rule("max_pool2d", "max_pool2d_with_indices", "avg_pool2d")
def _pool(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["self"]), result_shape(node)
    kernel, padding = pair(args["kernel_size"]), pair(args["padding"])
    stride = pair(args["stride"] or kernel)
    dilation = pair(args.get("dilation", 1))
    if kernel == before[-2:] and padding == (0, 0) and after[-2:] == (1, 1):
        return Flow(None, statistic=True)
    rows, cols = (
        axes.window(before[a - 2], after[a - 2], kernel[a], stride[a], dilation[a], padding[a])
        for a in (0, 1)
    )
    return Flow(_nchw(node, source), rows, cols)


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _padded(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
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


def pad_mode(name: str, args: dict[str, Any]) -> str:
    """constant, reflect, replicate or circular."""
    fixed = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}
    return fixed.get(name) or args.get("mode", "constant")


@rule("pixel_shuffle")
def _shuffled(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    height, width = result_shape(args["self"])[-2:]
    r = args["upscale_factor"]
    return Flow(_nchw(node, source), axes.shuffled(height, r), axes.shuffled(width, r))


@rule("pixel_unshuffle")
def _unshuffled(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    height, width = result_shape(args["self"])[-2:]
    r = args["downscale_factor"]
    return Flow(_nchw(node, source), axes.unshuffled(height, r), axes.unshuffled(width, r))


def _nchw(node: fx.Node, source: Flow) -> Layout:
    if source.layout != Layout():
        raise refusal(node, "it expects rows and columns to be the last two axes")
    return Layout()


# --- resampling

INTERPOLATIONS = {
    "upsample_nearest2d": "nearest",
    "_upsample_nearest_exact2d": "nearest_exact",
    "upsample_bilinear2d": "bilinear",
    "upsample_bicubic2d": "bicubic",
}


@rule(*INTERPOLATIONS)
def _interpolated(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    factors = resample_factors(args)
    kind = INTERPOLATIONS[operator_name(node)]
    rows, cols = (
        axes.taps(
            interpolation_taps(
                kind,
                before[a - 2],
                after[a - 2],
                align_corners=args.get("align_corners", False),
                factor=factors[a],
                dtype=node.meta["val"].dtype,
            ).index,
            before[a - 2],
        )
        for a in (0, 1)
    )
    return Flow(_nchw(node, source), rows, cols)


def resample_factors(args: dict[str, Any]) -> tuple[float | None, float | None]:
    """The scale factors that the operator was given, for rows and columns; None where sizes decide."""
    given = args.get("scale_factors")
    return (given[0], given[1]) if given else (None, None)


@rule("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_average(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["self"])[-2:], result_shape(node)[-2:]
    if before[0] > WIDEST_STREAMED_BIN * after[0] or (before != after and after[0] == 1):
        return Flow(None, statistic=True)
    rows, cols = (axes.taps(area_taps(before[a], after[a]).index, before[a]) for a in (0, 1))
    return Flow(_nchw(node, source), rows, cols)


@rule("adaptive_max_pool2d")
def _adaptive_maximum(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    return Flow(None, statistic=True)


# --- statistics over the image


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "std",
    "var",
    "argmax",
    "argmin",
    "linalg_vector_norm",
    "prod",
)
@rule("logsumexp", "any", "all", "var_mean")
def _reduced(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = _layout(source)
    shape = result_shape(args["self"])
    dims = args.get("dim")
    given = list(range(len(shape))) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    along = sorted((_negative(dim, shape) for dim in given), reverse=True)
    if layout.rows in along:
        if operator_name(node) not in STATISTICS:
            raise refusal(node, "it has no rule as a statistic over the image")
        return Flow(None, statistic=True)
    position: list[int | None] = [layout.rows, layout.cols]
    if not args.get("keepdim", False):
        for index, at in enumerate(position):
            if at is not None:
                position[index] = None if at in along else at + sum(dim > at for dim in along)
    return Flow(_moved(*position), local_columns=layout.cols not in along)


STATISTICS = frozenset({"mean", "sum", "amax", "amin", "std", "var", "linalg_vector_norm"})


@rule("group_norm", "instance_norm", "native_group_norm", "_native_batch_norm_legit")
def _normalised(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    return Flow(_nchw(node, source), statistic=True)
