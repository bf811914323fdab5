"""One row step as a pure function: (image rows, line buffers) -> (output rows, statistics, line buffers).

The image is a sequence and the line buffers are its state. Nothing is written in place, so the step can be
differentiated; `buffers.py` has the same step for inference, with buffers that are written in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.graph.trace import result_shape
from bigvision.streaming.kernels import Span
from bigvision.streaming.program import Pass, Stage
from bigvision.streaming.schedule import Schedule
from bigvision.streaming.statistics import Sums

Lines = dict[fx.Node, Tensor]
"""The line buffers between two steps: of every stage the rows kept[t] .. made[t], where there are any."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        row: the image's output row that `output` starts at.
        output: [1, K, h, w], or None where no output row became ready.
        sums: of every statistic with new rows, by the node it finishes into.
        lines: the line buffers that the next step needs.
    """

    row: int
    output: Tensor | None
    sums: dict[fx.Node, Sums]
    lines: Lines


def step(
    walk: Pass,
    plan: Schedule,
    t: int,
    image: Tensor,
    lines: Lines,
    held: dict[fx.Node, Any],
    wholes: dict[fx.Node, Sums] | None = None,
) -> StepResult:
    """Advance a pass by its step `t`.

    Args:
        walk, plan: the pass and its schedule.
        t: step, counted from 0.
        image: [1, C, h, W], the image rows made[t] .. made[t + 1].
        lines: the line buffers that step t - 1 left.
        held: weights, statistics and what was computed from them.
        wholes: the statistics' sums over the whole image, where the step is to be differentiated.
    """
    current: dict[fx.Node, Any] = dict(lines)
    sums: dict[fx.Node, Sums] = {}
    output = None
    before = {node: int(kept[t]) for node, kept in plan.kept.items()}
    for stage in walk.stages:
        node = stage.node
        a, b = int(plan.made[node][t]), int(plan.made[node][t + 1])
        if a == b:
            continue
        rows = image if stage is walk.stages[0] else _compute(stage, a, b, before, current, held, image)
        for one in walk.statistics:
            if one.source is node:
                sums[one.node] = (
                    one.partial(rows, a)
                    if wholes is None
                    else one.differentiable_partial(rows, a, wholes[one.node])
                )
        output = rows if stage is walk.output else output
        old = current.get(node)
        current[node] = rows if old is None else torch.cat([old, rows], stage.axis)
    row = 0 if walk.output is None else int(plan.made[walk.output.node][t])
    return StepResult(row, output, sums, _carried(walk, plan, t, current))


def _compute(
    stage: Stage,
    a: int,
    b: int,
    before: dict[fx.Node, int],
    current: dict[fx.Node, Any],
    held: dict[fx.Node, Any],
    image: Tensor,
) -> Any:
    span = stage.span(a, b)

    def values(source: fx.Node) -> Any:
        if source not in stage.inputs:
            return held_rows(stage, span, held[source])
        line = current[source] if source in current else no_rows(source, stage.input_axis, image)
        if isinstance(line, tuple | list):  # an operator with several results, consumed row for row
            return line
        start, stop = span.read
        return line.narrow(stage.input_axis, start - before[source], stop - start)

    return stage.kernel(values, span)


def no_rows(node: fx.Node, axis: int, like: Tensor) -> Tensor:
    """A stage's rows where it has none: what padding alone is added to."""
    shape = list(result_shape(node))
    shape[axis] = 0
    return like.new_empty(shape)


def held_rows(stage: Stage, span: Span, value: Any) -> Any:
    """A held value as a stage's rows a..b see it: whole, unless it has a row for every row of theirs."""
    if not isinstance(value, Tensor):
        return value
    if stage.grows and value.ndim == 4:
        start, stop = span.read
        return value.narrow(-2, start, stop - start)
    if stage.broadcasts and value.ndim >= -stage.axis and value.shape[stage.axis] == stage.size > 1:
        return value.narrow(stage.axis, span.a, span.b - span.a)
    return value


def _carried(walk: Pass, plan: Schedule, t: int, current: dict[fx.Node, Any]) -> Lines:
    """What of the lines (which begin at kept[t]) the next step still reads."""
    lines: Lines = {}
    for stage in walk.stages:
        node = stage.node
        start, stop = int(plan.kept[node][t + 1]), int(plan.made[node][t + 1])
        if start < stop:
            lines[node] = current[node].narrow(stage.axis, start - int(plan.kept[node][t]), stop - start)
    return lines
