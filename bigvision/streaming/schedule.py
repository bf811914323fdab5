"""Who has how many rows after which step: all of it follows from the shapes, before a pixel is read.

Legend: t step, T steps of a pass; rows before step t count from 0 at t = 0.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
from torch import fx

from bigvision.graph.layout import UnsupportedOperatorError, refusal
from bigvision.streaming.program import Pass, Stage


@dataclass(frozen=True, eq=False)
class Schedule:
    """The progress of every stage of one pass.

    Attributes:
        steps: T, a few more than the image's rows take: the deep branch lags behind.
        made: for every stage, int64 [T + 1], rows made once step t - 1 is over.
        kept: likewise, the first row that a later step still reads; rows kept[t] .. made[t] are the line
            buffer between steps t - 1 and t.
    """

    steps: int
    made: dict[fx.Node, np.ndarray]
    kept: dict[fx.Node, np.ndarray]


def schedule(walk: Pass, rows: int) -> Schedule:
    """The schedule of a pass that takes `rows` image rows a step.

    No stage makes more than its share of rows in a step, so that the deep branch's lag is caught up in a few
    steps behind the image's end rather than in one huge one, and every buffer stays small.
    """
    # A free stage ends with its readers, of which a crop leaves its last rows alone.
    paced = [stage for stage in walk.stages if not stage.free]
    behind = 1
    while True:
        steps = -(-walk.height // rows) + behind
        made = _progress(walk, rows, steps)
        unfinished = [stage for stage in paced if int(made[stage.node][-1]) != stage.size]
        if not unfinished:
            break
        # Behind the image's end a step in which nothing was made is followed by no other.
        if behind > 1 and all(made[stage.node][-1] == made[stage.node][-2] for stage in paced):
            raise _stalled(unfinished[0], int(made[unfinished[0].node][-1]))
        behind *= 2
    used = max(int(np.argmax(made[stage.node] == stage.size)) for stage in walk.stages)
    made = {node: progress[: used + 1] for node, progress in made.items()}
    return Schedule(used, made, _kept(walk, made))


def _stalled(stage: Stage, made: int) -> UnsupportedOperatorError:
    return refusal(stage.node, f"of its {stage.size} rows only {made} can be made from the image's")


def _progress(walk: Pass, rows: int, steps: int) -> dict[fx.Node, np.ndarray]:
    pace = np.minimum(np.arange(steps + 1) * rows, walk.height)
    made: dict[fx.Node, np.ndarray] = {}
    for stage in walk.stages:
        if stage.node in walk.given:
            made[stage.node] = -(-stage.size * pace // walk.height)
        elif not stage.free:
            share = -(-rows * stage.size // walk.height)
            made[stage.node] = _throttled(_ready(stage, made), share)
    _ask_free_stages(walk, made, pace)
    return made


def _throttled(ready: np.ndarray, share: int) -> np.ndarray:
    """Progress with at most `share` rows a step: made[t + 1] = min(ready[t + 1], made[t] + share)."""
    allowance = np.arange(len(ready)) * share
    return np.minimum.accumulate(ready - allowance) + allowance


def _ready(stage: Stage, made: dict[fx.Node, np.ndarray]) -> np.ndarray:
    """Rows that a stage could have made by then, given what its inputs have."""
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
    for stage in walk.stages:
        if (
            stage.free and stage.node.target is operator.getitem
        ):  # one of several results, made with the others
            made[stage.node] = made[stage.inputs[0]]


def _read_until(consumer: Stage, made: np.ndarray) -> np.ndarray:
    """How many rows of its inputs a stage has read once it has made so many of its own."""
    if consumer.rows is None:
        return made
    last = np.minimum(consumer.rows.last, consumer.size_in - 1)
    return np.where(made > 0, last[np.maximum(made, 1) - 1] + 1, 0)


def read_from(consumer: Stage, made: np.ndarray) -> np.ndarray:
    """The first row of its inputs that a stage will still read once it has made so many of its own."""
    if consumer.rows is None:
        return made
    following = np.minimum(made, consumer.size - 1)
    start = np.maximum(consumer.rows.first[following], 0)
    return np.where(made < consumer.size, start, consumer.size_in)


def _kept(walk: Pass, made: dict[fx.Node, np.ndarray]) -> dict[fx.Node, np.ndarray]:
    kept = {stage.node: made[stage.node].copy() for stage in walk.stages}
    for consumer in walk.stages:
        start = read_from(consumer, made[consumer.node])
        for source in consumer.inputs:
            kept[source] = np.minimum(kept[source], start)
    return kept
