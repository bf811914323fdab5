"""Operators that move, merge, split or cut axes: the rows must stay an axis of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from bigvision.graph import axes
from bigvision.graph.layout import Flow, Layout, refusal
from bigvision.graph.rules.registry import layout_of, moved_layout, negative, pulled, pushed, rule
from bigvision.graph.trace import result_shape

# So few rows are gathered whole where a view merges them with another axis: a classifier's flat 7 x 7 map.
GATHERED_ROWS = 8


@rule(permute="self dims", transpose="self dim0 dim1", t="self")
def _permuted(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    ndim = len(result_shape(node))
    if "dims" in args:
        order = [dim % ndim for dim in args["dims"]]
    else:
        order = list(range(ndim))
        a, b = args.get("dim0", 0) % ndim, args.get("dim1", 1) % ndim
        order[a], order[b] = order[b], order[a]

    def moved(position: int | None) -> int | None:
        return None if position is None else order.index(position + ndim) - ndim

    return Flow(moved_layout(moved(layout.rows), moved(layout.cols)))


@rule(unsqueeze="self dim")
def _unsqueezed(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout, axis = layout_of(source), negative(args["dim"], result_shape(node))
    return Flow(moved_layout(pushed(layout.rows, axis), pushed(layout.cols, axis)))


@rule(squeeze="self dim")
def _squeezed(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    if isinstance(args.get("dim"), int):
        axis = negative(args["dim"], result_shape(args["self"]))
        if axis not in (layout.rows, layout.cols):
            return Flow(moved_layout(pulled(layout.rows, axis), pulled(layout.cols, axis)))
    return _viewed(node, args, source)


@rule(view="self size", _unsafe_view="self size")
def _viewed(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    before, after = result_shape(args["self"]), result_shape(node)
    rows = _carried(before, after, layout.rows)
    if rows is None and before[layout.rows] <= GATHERED_ROWS:
        return Flow(None, statistic=True)
    if rows is None:
        raise refusal(node, f"its view from {before} to {after} merges rows with another axis")
    cols = None if layout.cols is None else _carried(before, after, layout.cols)
    return Flow(Layout(rows, cols), local_columns=cols is not None)


def _carried(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The axis of `after` that is exactly axis `axis` of `before`, if there is one.

    Of an image of one row or column, where several fit, the one with as many axes behind it.
    """
    inner, size = math.prod(before[len(before) + axis + 1 :]), before[axis]
    places = sorted(range(-1, -len(after) - 1, -1), key=lambda place: place != axis)
    return next(
        (q for q in places if after[q] == size and math.prod(after[len(after) + q + 1 :]) == inner), None
    )


@rule(expand="self size")
def _expanded(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    return Flow(source.layout)


@rule(select="self dim index")
def _selected(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    axis = negative(args["dim"], result_shape(args["self"]))
    if axis == layout.rows:
        raise refusal(node, "it picks one row of the image")
    rows = pulled(layout.rows, axis)
    assert rows is not None
    return Flow(
        Layout(rows, None if axis == layout.cols else pulled(layout.cols, axis)),
        local_columns=axis != layout.cols,
    )


@rule(slice="self dim start end step")
def _sliced(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    before, after = result_shape(args["self"]), result_shape(node)
    axis = negative(args["dim"], before)
    if axis not in (layout.rows, layout.cols):
        return Flow(layout)
    start = args["start"] or 0
    start = max(start + before[axis], 0) if start < 0 else min(start, before[axis])
    kept = axes.sliced(before[axis], start, args["step"], after[axis])
    return Flow(layout, rows=kept) if axis == layout.rows else Flow(layout, cols=kept)
