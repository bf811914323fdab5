"""How each stage's rows are kept for those that read them, decided from the schedule alone.

Legend: t step, T steps of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from bigvision.streaming.program import Pass, Stage
from bigvision.streaming.schedule import Schedule, read_from


@dataclass(frozen=True, eq=False)
class LinePlan:
    """What is kept of one stage's rows.

    Attributes:
        capacity: rows of the buffer that windows across the border between two steps read from; 0: no buffer.
        window_keep: int64 [T + 1], the first row that such a window still reads.
        delayed: the readers that take its rows later than it makes them, row for row.
        delay_keep: int64 [T + 1], the first row that they still read.
        last_reader: the last stage that reads it within a step.
        private: one stage alone reads it, all of it in the step that made it.
    """

    capacity: int
    window_keep: np.ndarray
    delayed: frozenset[fx.Node]
    delay_keep: np.ndarray
    last_reader: fx.Node | None
    private: bool


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
    window_keep = np.min([starts[node] for node in windows] + [made], axis=0)
    return LinePlan(
        capacity=_capacity(made, window_keep) if windows else 0,
        window_keep=window_keep,
        delayed=delayed,
        delay_keep=np.min([starts[node] for node in delayed] + [made], axis=0),
        last_reader=readers[-1].node if readers else None,
        private=len(readers) == 1 and not late,
    )


def _capacity(made: np.ndarray, keep: np.ndarray) -> int:
    """Rows that a window buffer must hold; where more stay than come, room to move them only now and then."""
    stay = int((made - keep).max())
    come = int((made[1:] - made[:-1]).max())
    need = int((made[1:] - keep[:-1]).max())
    return need + (stay if stay > come else 0)
