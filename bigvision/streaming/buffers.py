"""The row step for inference: line buffers that are written in place, nothing kept longer than it is read.

Two kinds of line, by what reads it. A *window* (a convolution) reads rows across the border between two
steps: its input stands in one preallocated buffer, into which the operator before it writes its rows
directly. A *delay* (a skip connection) is read once, row for row, when the deep branch has caught up: it is a
queue of the pieces as they were made, and none is ever moved.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bigvision.graph.trace import result_shape
from bigvision.streaming.kernels import Span, Values, is_finite
from bigvision.streaming.lines import (
    Columns,
    LinePlan,
    column_padding,
    keeps_finite,
    overwritten_input,
    plan_lines,
)
from bigvision.streaming.program import Pass, Stage
from bigvision.streaming.row_store import GivenRows
from bigvision.streaming.scan import Lines, StepResult, held_rows, no_rows
from bigvision.streaming.schedule import Schedule
from bigvision.streaming.statistics import Sums


class WindowBuffer:
    """Consecutive rows in one block of memory, channels last, so that any run of rows is a view.

    Beside the rows stand the zero columns that convolutions want (`LinePlan.columns`).
    """

    def __init__(
        self, stage: Stage, plan: LinePlan, first: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = list(result_shape(stage.node))
        shape[stage.axis] = plan.capacity
        self.axis, self.capacity = stage.axis, plan.capacity
        self.columns, self.width = plan.columns, shape[-1]
        shape[-1] += sum(plan.columns)
        layout = torch.channels_last if len(shape) == 4 and stage.axis == -2 else torch.contiguous_format
        self.data = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
        for outside in (slice(self.columns[0]), slice(self.columns[0] + self.width, None)):
            self.data[..., outside].zero_()
        self.base = self.stop = first  # the image's row at the front, and the one behind the last

    def reserve(self, keep: int, rows: int) -> Tensor:
        """Room for the next `rows` rows; rows before `keep` may be given up."""
        if self.stop + rows - self.base > self.capacity:
            kept, moved = self.stop - keep, keep - self.base
            old = self.data.narrow(self.axis, moved, kept)
            self.data.narrow(self.axis, 0, kept).copy_(old if moved >= kept else old.clone())
            self.base = keep
        room = self.data.narrow(self.axis, self.stop - self.base, rows)
        self.stop += rows
        return self._with(room, (0, 0))

    def rows(self, start: int, stop: int, columns: Columns = (0, 0)) -> Tensor:
        """Rows start..stop, a view, with as many zero `columns` beside them, where there are so many."""
        fits = all(wanted <= here for wanted, here in zip(columns, self.columns, strict=True))
        rows = self.data.narrow(self.axis, start - self.base, stop - start)
        return self._with(rows, columns if fits else (0, 0))

    def _with(self, rows: Tensor, columns: Columns) -> Tensor:
        if columns == self.columns:
            return rows
        return rows.narrow(-1, self.columns[0] - columns[0], self.width + sum(columns))


class DelayLine:
    """Pieces in the order they were made, each dropped once all of its rows were read."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.pieces: deque[tuple[int, Tensor]] = deque()

    def push(self, first: int, piece: Tensor) -> None:
        """Append a piece whose first row is the image's row `first`."""
        self.pieces.append((first, piece))

    def drop(self, keep: int) -> None:
        """Give up rows before `keep`."""
        while self.pieces and self.pieces[0][0] + self.pieces[0][1].shape[self.axis] <= keep:
            self.pieces.popleft()

    def joints(self, start: int, stop: int) -> list[int]:
        """Where one piece ends and the next begins, within start..stop."""
        return [first for first, _ in self.pieces if start < first < stop]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop: a view where they lie in one piece."""
        parts = []
        for first, piece in self.pieces:
            low, high = max(start, first), min(stop, first + piece.shape[self.axis])
            if low < high:
                parts.append(piece.narrow(self.axis, low - first, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


class Line:
    """One stage's rows: the fresh ones of this step, and what is kept of older ones."""

    def __init__(
        self, stage: Stage, plan: LinePlan, first: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan
        self.window = WindowBuffer(stage, plan, first, dtype, device) if plan.capacity else None
        self.delay = DelayLine(stage.axis) if plan.delayed else None
        self.reserved: Tensor | None = None
        self.fresh: Any = None
        self.fresh_first = 0

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its rows, where it has any."""
        rows = self.fresh
        if rows is None and self.delay is not None and self.delay.pieces:
            rows = self.delay.pieces[0][1]
        elif rows is None and self.window is not None:
            rows = self.window.data
        return rows.dtype if isinstance(rows, Tensor) else None


class Scanner:
    """One pass over an image, step by step, in bounded memory.

    Args:
        walk, plan: the pass and its schedule.
        held: weights, statistics and what was computed from them.
        rows: where the pass's given rows come from, and its spilled ones go.
        dtype, device: of the rows.
    """

    def __init__(
        self,
        walk: Pass,
        plan: Schedule,
        held: dict[fx.Node, Any],
        rows: GivenRows,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.walk, self.plan, self.held, self.rows = walk, plan, held, rows
        self.like = torch.empty(0, dtype=dtype, device=device)
        plans = plan_lines(walk, plan)
        self.lines = {
            stage.node: Line(stage, plans[stage.node], int(plan.made[stage.node][0]), dtype, device)
            for stage in walk.stages
        }
        windows = (line.window for line in self.lines.values() if line.window is not None)
        self.overwritten = frozenset(window.data.untyped_storage().data_ptr() for window in windows)
        # From the first value on that may not be finite, kernels that would lose NaN are left alone.
        self.wary = any(stage.careful is not None for stage in walk.stages)
        self.finite = not self.wary or all(map(_all_finite, held.values()))

    def advance(self, t: int) -> StepResult:
        """Step `t`: the new output rows and statistics' sums."""
        sums: dict[fx.Node, Sums] = {}
        output = None
        for stage in self.walk.stages:
            made = self.plan.made[stage.node]
            a, b = int(made[t]), int(made[t + 1])
            if a == b:
                continue
            rows = self._make(stage, a, b, t)
            if stage is self.walk.output:
                output = self._lasting(rows)
            self._account(stage, a, rows, sums)
            self._release(stage, t)
        for line in self.lines.values():
            line.fresh = None
            if line.delay is not None:
                line.delay.drop(int(line.plan.delay_keep[t + 1]))
        row = 0 if self.walk.output is None else int(self.plan.made[self.walk.output.node][t])
        return StepResult(row, output, sums)

    def _account(self, stage: Stage, a: int, rows: Any, sums: dict[fx.Node, Sums]) -> None:
        """Sum and keep what is to be summed and kept of the new rows a.. of a stage."""
        statistics = [one for one in self.walk.statistics if one.source is stage.node]
        spilled = stage in self.walk.spilled
        if not statistics and not spilled:
            return
        start, stop = self.walk.share(stage, a, a + rows.shape[stage.axis])
        if start == stop:
            return
        own = rows.narrow(stage.axis, start - a, stop - start)
        for one in statistics:
            sums[one.node] = one.partial(own, start)
        if spilled:
            self.rows.keep(stage, start, own)

    def state(self, t: int) -> Lines:
        """What step `t`, the next one, needs of the steps before it: views of the line buffers."""
        lines: Lines = {}
        for stage in self.walk.stages:
            line, start = self.lines[stage.node], int(self.plan.kept[stage.node][t])
            stop = int(self.plan.made[stage.node][t])
            if start >= stop:
                continue
            if line.window is not None and start >= int(line.plan.window_keep[t]):
                lines[stage.node] = line.window.rows(start, stop)
            elif line.delay is not None:
                lines[stage.node] = line.delay.rows(start, stop)
        return lines

    def restore(self, t: int, lines: Lines) -> Scanner:
        """Begin at step `t` with the state before it; the scanner itself."""
        for stage in self.walk.stages:
            line, stop = self.lines[stage.node], int(self.plan.made[stage.node][t])
            kept, rows = int(self.plan.kept[stage.node][t]), lines.get(stage.node)
            if line.window is not None:
                start = int(line.plan.window_keep[t])
                line.window.base = line.window.stop = start
                if rows is not None and start < stop:
                    line.window.reserve(start, stop - start).copy_(
                        rows.narrow(stage.axis, start - kept, stop - start)
                    )
            if line.delay is not None and rows is not None:
                line.delay.push(kept, rows)
        self._watch(*lines.values())
        return self

    def _watch(self, *rows: Any) -> None:
        """Notice values that are not finite, where that matters."""
        if self.wary and self.finite:
            self.finite = all(map(_all_finite, rows))

    def _lasting(self, rows: Tensor) -> Tensor:
        """The rows, where no later step writes: a crop's are a view of a line buffer."""
        return rows.clone() if rows.untyped_storage().data_ptr() in self.overwritten else rows

    def _make(self, stage: Stage, a: int, b: int, t: int) -> Any:
        """Rows a..b of a stage, in its line."""
        line = self.lines[stage.node]
        given = stage.node in self.walk.given
        if given:
            rows = self.rows.read(stage, a, b)
        elif (place := self._place(stage, b - a, t)) is not None:
            rows, line.reserved = self._write(stage, a, b, place), None
        elif (place := self._own_input(stage)) is not None:
            rows = self._write(stage, a, b, place)
        else:
            span = stage.span(a, b)
            kernel = stage.kernel if self.finite or stage.careful is None else stage.careful
            rows = kernel(self._values(stage, span), span)
        if line.window is not None and (line.delay is not None or given):
            line.window.reserve(int(line.plan.window_keep[t]), b - a).copy_(rows)
        if line.delay is not None:
            line.delay.push(a, self._lasting(rows))
        line.fresh, line.fresh_first = rows, a
        if given or not keeps_finite(stage):
            self._watch(rows)
        return rows

    def _write(self, stage: Stage, a: int, b: int, place: Tensor) -> Tensor:
        """Compute rows a..b of a stage into `place`: in parts, as its delayed inputs lie in pieces."""
        cuts = {a, b}
        if stage.rows is None:
            for source in stage.inputs:
                line = self.lines[source]
                if line.delay is not None and stage.node in line.plan.delayed:
                    cuts.update(line.delay.joints(a, b))
        for start, stop in itertools.pairwise(sorted(cuts)):
            span = stage.span(start, stop)
            part = place.narrow(stage.axis, start - a, stop - start)
            values = self._values(stage, span)
            if stage.writer is None:
                part.copy_(stage.kernel(values, span))
            else:
                stage.writer(values, span, part)
        return place

    def _values(self, stage: Stage, span: Span) -> Values:
        def values(source: fx.Node) -> Any:
            if source not in stage.inputs:
                return held_rows(stage, span, self.held[source])
            return self._rows(stage, source, *span.read)

        return values

    def _place(self, stage: Stage, rows: int, t: int) -> Tensor | None:
        """Where a stage's next rows are read, if they can be made there: a buffer, or a part of one."""
        line = self.lines[stage.node]
        if line.reserved is not None or line.delay is not None:
            return line.reserved
        if line.window is not None:
            return line.window.reserve(int(line.plan.window_keep[t]), rows)
        if line.plan.part_of is None:
            return None
        whole, start = line.plan.part_of
        around = self.lines[whole.node]
        around.reserved = self._place(whole, rows, t)
        if around.reserved is None:
            return None
        return around.reserved.narrow(-3, start, stage.shape[-3])

    def _own_input(self, stage: Stage) -> Tensor | None:
        """The input that an elementwise operator may overwrite: one that nobody else reads."""
        source = overwritten_input(stage)
        if source is None or source in self.walk.given:
            return None
        line = self.lines[source]
        if not line.plan.private or line.window is not None:
            return None
        return line.fresh if all(self.lines[one].dtype == line.dtype for one in stage.inputs) else None

    def _rows(self, reader: Stage, source: fx.Node, start: int, stop: int) -> Any:
        line = self.lines[source]
        if line.delay is not None and reader.node in line.plan.delayed:
            return line.delay.rows(start, stop)
        if line.window is not None:
            return line.window.rows(start, stop, column_padding(reader))
        if isinstance(line.fresh, tuple):  # an operator with several results, consumed row for row
            return line.fresh
        if start == stop:  # padding alone
            return no_rows(source, reader.input_axis, self.like)
        return line.fresh.narrow(reader.input_axis, start - line.fresh_first, stop - start)

    def _release(self, stage: Stage, t: int) -> None:
        """Forget fresh rows that were read for the last time in this step."""
        for source in stage.inputs:
            line = self.lines[source]
            if line.plan.last_reader is stage.node:
                line.fresh = None


def _all_finite(value: Any) -> bool:
    return all(is_finite(part) for part in pytree.tree_leaves(value) if isinstance(part, Tensor))
