"""Who has how many rows after which step: all of it follows from the shapes, before a pixel is read.

Legend: t step, T steps of a pass; rows before step t count from 0 at t = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from bigvision.streaming.program import Pass, Stage


@dataclass(frozen=True, eq=False)
class Schedule:
    """The progress of every stage of one pass.

    Attributes:
        steps: T.
        made: for every stage, int64 [T + 1], rows made once step t - 1 is over.
        kept: likewise, the first row that a later step still reads; rows kept[t] .. made[t] are the line
            buffer between steps t - 1 and t.
    """

    steps: int
    made: dict[fx.Node, np.ndarray]
    kept: dict[fx.Node, np.ndarray]


def schedule(walk: Pass, rows: int) -> Schedule:
    """The schedule of a pass that takes `rows` image rows a step (the last step may have fewer)."""
    image = walk.stages[0]
    steps = -(-image.size // rows)
    pace = np.minimum(np.arange(steps + 1) * rows, image.size)
    made: dict[fx.Node, np.ndarray] = {image.node: pace}
    for stage in walk.stages[1:]:
        if not stage.free:
            made[stage.node] = _ready(stage, made)
    _ask_free_stages(walk, made, pace)
    return Schedule(steps, made, _kept(walk, made))


def _ready(stage: Stage, made: dict[fx.Node, np.ndarray]) -> np.ndarray:
    """Rows that a stage can have made once its inputs have theirs."""
    available = np.min([made[source] for source in stage.inputs if source in made], axis=0)
    if stage.rows is None:
        return available
    ready = np.searchsorted(stage.rows.last, available, side="left")
    ready = np.where(available >= stage.size_in, stage.size, ready)
    return np.where(available > 0, ready, 0)  # padding alone makes no row


def _ask_free_stages(walk: Pass, made: dict[fx.Node, np.ndarray], pace: np.ndarray) -> None:
    """Stages that wait for no image row run no earlier than their consumers need."""
    for stage in reversed(walk.stages):
        if not stage.free:
            continue
        asked = [
            _read_until(consumer, made[consumer.node])
            for consumer in walk.stages
            if stage.node in consumer.inputs
        ]
        if stage is walk.output or any(one.source is stage.node for one in walk.statistics):
            asked.append(-(-stage.size * pace // pace[-1]))
        made[stage.node] = np.minimum(np.max(asked, axis=0), stage.size)


def _read_until(consumer: Stage, made: np.ndarray) -> np.ndarray:
    """How many rows of its inputs a stage has read once it has made so many of its own."""
    if consumer.rows is None:
        return made
    last = np.minimum(consumer.rows.last, consumer.size_in - 1)
    return np.where(made > 0, last[np.maximum(made, 1) - 1] + 1, 0)


def _kept(walk: Pass, made: dict[fx.Node, np.ndarray]) -> dict[fx.Node, np.ndarray]:
    kept = {stage.node: made[stage.node].copy() for stage in walk.stages}
    for consumer in walk.stages:
        done = made[consumer.node]
        if consumer.rows is None:
            start = done
        else:
            following = np.minimum(done, consumer.size - 1)
            start = np.where(
                done < consumer.size, np.maximum(consumer.rows.first[following], 0), consumer.size_in
            )
        for source in consumer.inputs:
            kept[source] = np.minimum(kept[source], start)
    return kept
