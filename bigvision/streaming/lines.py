"""How each stage's rows are kept for those that read them, decided from the schedule alone.

Legend: t step, T steps of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from bigvision.graph.arguments import arguments, convolution_padding
from bigvision.graph.trace import operator_name, result_shape
from bigvision.streaming.into import ELEMENTWISE
from bigvision.streaming.program import Pass, Stage
from bigvision.streaming.schedule import Schedule, read_from

Columns = tuple[int, int]
"""How many, left and right."""


@dataclass(frozen=True, eq=False)
class LinePlan:
    """What is kept of one stage's rows.

    Attributes:
        capacity: rows of the buffer that windows across the border between two steps read from; 0: no buffer.
        window_keep: int64 [T + 1], the first row that such a window still reads.
        columns: zero columns left and right of the buffer's rows, so that a convolution need not pad them.
        delayed: the readers that take its rows later than it makes them, row for row.
        delay_keep: int64 [T + 1], the first row that they still read.
        last_reader: the last stage that reads it within a step.
        private: one stage alone reads it, all of it in the step that made it.
        part_of: the concatenation that its rows are made in the place of, and where among its channels.
    """

    capacity: int
    window_keep: np.ndarray
    columns: Columns
    delayed: frozenset[fx.Node]
    delay_keep: np.ndarray
    last_reader: fx.Node | None
    private: bool
    part_of: tuple[Stage, int] | None


def plan_lines(walk: Pass, plan: Schedule) -> dict[fx.Node, LinePlan]:
    """The line plan of every stage of a pass."""
    readers: dict[fx.Node, list[Stage]] = {stage.node: [] for stage in walk.stages}
    for stage in walk.stages:
        for source in stage.inputs:
            readers[source].append(stage)
    return {stage.node: _plan_line(stage, readers[stage.node], plan) for stage in walk.stages}


def _plan_line(stage: Stage, readers: list[Stage], plan: Schedule) -> LinePlan:
    made = plan.made[stage.node]
    starts = {reader.node: read_from(reader, plan.made[reader.node]) for reader in readers}
    late = [reader for reader in readers if (starts[reader.node][:-1] < made[:-1]).any()]
    windows = [reader.node for reader in late if reader.rows is not None]
    delayed = frozenset(reader.node for reader in late) - set(windows)
    private = len(readers) == 1 and not late
    window_keep = np.min([starts[node] for node in windows] + [made], axis=0)
    return LinePlan(
        capacity=_capacity(made, window_keep) if windows else 0,
        window_keep=window_keep,
        columns=_columns(stage, [reader for reader in readers if reader.node not in delayed]),
        delayed=delayed,
        delay_keep=np.min([starts[node] for node in delayed] + [made], axis=0),
        last_reader=readers[-1].node if readers else None,
        private=private,
        part_of=_place(stage, readers[0]) if private else None,
    )


def _capacity(made: np.ndarray, keep: np.ndarray) -> int:
    """Rows that a window buffer must hold; where more stay than come, room to move them only now and then."""
    stay = int((made - keep).max())
    come = int((made[1:] - made[:-1]).max())
    need = int((made[1:] - keep[:-1]).max())
    return need + (stay if stay > come else 0)


def _place(stage: Stage, reader: Stage) -> tuple[Stage, int] | None:
    """Where in its only reader's rows a stage can make its own."""
    if operator_name(reader.node) != "cat" or stage.writer is None:
        return None
    args, axis = arguments(reader.node), len(stage.shape) - 3
    if args["dim"] % len(stage.shape) != axis or stage.axis != -2:
        return None
    parts = args["tensors"]
    if parts.count(stage.node) > 1:
        return None
    return reader, sum(result_shape(part)[axis] for part in parts[: parts.index(stage.node)])


def column_padding(stage: Stage) -> Columns:
    """Zero columns that a convolution adds to its input; none for any other operator."""
    node = stage.operators[0]
    if operator_name(node) != "conv2d":
        return 0, 0
    args = arguments(node)
    return convolution_padding(args, result_shape(args["weight"])[-2:])[1]


def _columns(stage: Stage, readers: list[Stage]) -> Columns:
    """The padding that readers with most of the work want; others then read a part of the rows.

    Given its padding, oneDNN's convolution of channels-last bfloat16 was measured at 1.3 to 2.1 times the
    speed that it has when it pads by itself, which copies the rows.
    """
    if len(stage.shape) != 4 or stage.axis != -2:
        return 0, 0
    work: dict[Columns, int] = {}
    for reader in readers:
        wanted = column_padding(reader)
        work[wanted] = work.get(wanted, 0) + reader.flops
    most, share = max(work.items(), key=lambda one: one[1], default=((0, 0), 0))
    return most if 2 * share > sum(work.values()) else (0, 0)


# What they give is memory of their own, not a view of something that others read.
_OWNERS = {*ELEMENTWISE, "conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "cat", "linear"}


def overwritten_input(stage: Stage) -> fx.Node | None:
    """The input in whose memory an elementwise operator can leave its result, if nobody else needs it."""
    node = stage.node
    if len(stage.operators) > 1 or operator_name(node) not in ELEMENTWISE or stage.writer is None:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in stage.inputs or operator_name(source) not in _OWNERS:
        return None
    same = result_shape(source) == result_shape(node) and source.meta["val"].dtype == node.meta["val"].dtype
    return source if same else None


# Of finite numbers below the type's limits they make finite ones.
_KEEP_FINITE = (_OWNERS - {"div"}) | {
    *("getitem", "slice", "select", "view", "permute", "transpose", "alias", "clone", "split", "unbind"),
    *("split_with_sizes", "pad", "constant_pad_nd", "pixel_shuffle", "max_pool2d_with_indices", "layer_norm"),
    *("_native_batch_norm_legit_no_training", "native_layer_norm", "group_norm", "adaptive_avg_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d"),
}


def keeps_finite(stage: Stage) -> bool:
    """Whether a stage makes finite numbers of finite ones."""
    return all(operator_name(node) in _KEEP_FINITE for node in stage.operators)
