"""Operators whose row i reads row i of their inputs: elementwise ones and those along another axis."""

from __future__ import annotations

from typing import Any

from torch import fx

from bigvision.graph.layout import Flow, Layout, refusal
from bigvision.graph.rules.registry import layout_of, moved_layout, pulled, pushed, rule
from bigvision.graph.trace import operator_name, result_shape


@rule(
    hardswish="self",
    log_sigmoid="self",
    relu6="self",
    rrelu="self lower upper training=False",
    native_dropout="input p train=False",
    rsub="self other alpha",
    masked_fill="self mask value",
    where="condition self other",
    type_as="self other",
    _to_copy="self dtype device pin_memory non_blocking memory_format",
    clone="self memory_format",
    alias="self",
    detach="self",
)
def pointwise(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    """Elementwise operators, broadcasting included."""
    layout = layout_of(source)
    value = node.meta["val"]
    if not isinstance(value, list | tuple) and value.ndim > _widest_input(node):
        raise refusal(node, "it broadcasts rows against another axis")
    return Flow(layout, broadcasts=True)


def _widest_input(node: fx.Node) -> int:
    return max(len(result_shape(source)) for source in node.all_input_nodes)


@rule(
    _native_batch_norm_legit_no_training="input weight bias running_mean running_var momentum eps",
    prelu="self weight",
    channel_shuffle="self groups",
    native_channel_shuffle="self groups",
)
def by_channel(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    """Operators that treat every channel, axis 1, in its own way, or move channels."""
    layout = layout_of(source)
    if layout.rows == 1 - len(result_shape(node)):
        raise refusal(node, "it would treat every row as a channel: its input has the rows on axis 1")
    return Flow(layout)


@rule(
    cat="tensors dim",
    stack="tensors dim",
    split="self split_size dim",
    split_with_sizes="self split_sizes dim",
    unbind="self dim",
    softmax="self dim dtype",
    _softmax="self dim half_to_float",
    log_softmax="self dim dtype",
    _log_softmax="self dim half_to_float",
    cumsum="self dim dtype",
    glu="self dim",
    flip="self dims",
)
def _along_an_axis(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    name = operator_name(node)
    ndim = len(result_shape(node.all_input_nodes[0]))
    given = args["dims"] if name == "flip" else [args["dim"]]
    new_axis = 1 if name == "stack" else 0
    along = {dim if dim < 0 else dim - ndim - new_axis for dim in given}
    if name == "stack":  # a new axis at or behind the rows pushes them to the left
        (axis,) = along
        return Flow(moved_layout(pushed(layout.rows, axis), pushed(layout.cols, axis)), broadcasts=True)
    if layout.rows in along:
        raise refusal(node, "it works along the rows")
    if name == "unbind":
        (axis,) = along
        return Flow(moved_layout(pulled(layout.rows, axis), pulled(layout.cols, axis)))
    return Flow(layout, local_columns=layout.cols not in along, broadcasts=True)


@rule(
    linear="input weight bias",
    layer_norm="input normalized_shape weight bias eps cudnn_enable",
    native_layer_norm="input normalized_shape weight bias eps",
    rms_norm="input normalized_shape weight eps",
)
def _over_the_last_axes(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    count = len(args["normalized_shape"]) if "normalized_shape" in args else 1
    if layout.rows >= -count:
        raise refusal(node, "it mixes rows (GroupNorm(1, C) normalises over channels and space by phases)")
    return Flow(layout, local_columns=layout.cols is None or layout.cols < -count)


@rule(matmul="self other")
def _matmul(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    """A streamed value times a held matrix (or one vector) from the right."""
    layout, right = layout_of(source), result_shape(args["other"])
    if layout.rows == -1:
        raise refusal(node, "it mixes rows")
    if len(right) > 2:
        raise refusal(node, "it takes another matrix for every part of its batch")
    cols = None if layout.cols == -1 else layout.cols
    if len(right) == 1:
        return Flow(moved_layout(pulled(layout.rows, -1), pulled(cols, -1)), local_columns=layout.cols != -1)
    return Flow(Layout(layout.rows, cols), local_columns=layout.cols != -1)


@rule(
    bmm="self mat2",
    einsum="tensors equation path",
    baddbmm="self batch1 batch2 beta alpha",
    scaled_dot_product_attention="query key value is_causal scale",
)
def _attention(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    raise refusal(node, "it is attention over pixels")
