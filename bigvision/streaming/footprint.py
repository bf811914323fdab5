"""What a pass takes in memory, read off its schedule before a pixel is.

Legend: t step, T steps of a pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from bigvision.graph.trace import operator_name
from bigvision.streaming.checkpoints import StepBytes
from bigvision.streaming.lines import LinePlan, overwritten_input, plan_lines
from bigvision.streaming.program import Pass, Program, Stage
from bigvision.streaming.schedule import Schedule, schedule

# A step's tape holds its results; while it is differentiated, gradients of the widest of them come on top.
GRADIENTS_ALIVE = 3
# What the heap and oneDNN's own buffers take beyond that, measured at 1.05 to 1.15.
TAPE_SLACK = 1.12

# They give (a part of) their input's own memory.
_VIEWS = frozenset(("getitem", "view", "split", "chunk", "slice", "permute", "transpose", "alias", "detach"))


def row_bytes(stage: Stage, dtype: torch.dtype) -> int:
    """Bytes of one row of a stage's (first) result, computed in `dtype`."""
    return math.prod(stage.shape) // stage.size * row_dtype(stage, dtype).itemsize


def row_dtype(stage: Stage, dtype: torch.dtype) -> torch.dtype:
    """Of a stage's (first) result, where floating-point numbers are computed in `dtype`."""
    value: Any = stage.node.meta["val"]
    own: torch.dtype = (value[0] if isinstance(value, list | tuple) else value).dtype
    return dtype if own.is_floating_point else own


def state_bytes(walk: Pass, plan: Schedule, dtype: torch.dtype) -> np.ndarray:
    """Bytes of the line buffers before every step and after the last, int64 [T + 1]."""
    total = np.zeros(plan.steps + 1, np.int64)
    for stage in walk.stages:
        total += (plan.made[stage.node] - plan.kept[stage.node]) * row_bytes(stage, dtype)
    return total


def tape_bytes(walk: Pass, plan: Schedule, dtype: torch.dtype) -> np.ndarray:
    """Bytes that every step's results and their gradients take at once, int64 [T]."""
    results = np.zeros(plan.steps, np.int64)
    widest = np.zeros(plan.steps, np.int64)
    for stage in walk.stages:
        if operator_name(stage.node) in _VIEWS and stage.node.op == "call_function":
            continue
        made, kept = plan.made[stage.node], plan.kept[stage.node]
        fresh = np.diff(made)
        joined = np.where((fresh > 0) & (made[:-1] > kept[:-1]), made[1:] - kept[:-1], 0)
        size = (fresh + joined) * row_bytes(stage, dtype)
        results += size
        widest = np.maximum(widest, size)
    return results + GRADIENTS_ALIVE * widest


def step_bytes(program: Program, walk: Pass, rows: int, dtype: torch.dtype) -> StepBytes:
    """What differentiating a pass takes at `rows` image rows a step."""
    plan = schedule(walk, rows)
    state = int(state_bytes(walk, plan, dtype).max())
    weights = sum(_weight_bytes(node, program, dtype) for node in program.traced.tensors)
    # The state read, its gradient, and the gradient of the state left.
    working = weights + 3 * state + int(tape_bytes(walk, plan, dtype).max())
    return StepBytes(rows, plan.steps, state, int(TAPE_SLACK * working))


def _weight_bytes(node: fx.Node, program: Program, dtype: torch.dtype) -> int:
    """A weight as it is computed with, and its gradient."""
    tensor = program.traced.tensors[node]
    if not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * (dtype.itemsize * 2 + max(tensor.element_size(), 4))


def forward_bytes(program: Program, rows: int, dtype: torch.dtype) -> int:
    """The most bytes that an inference pass holds at once, weights included, at `rows` image rows a step."""
    weights = sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in program.traced.tensors.values()
    )
    return weights + max(_scanner_bytes(walk, schedule(walk, rows), dtype) for walk in program.passes)


def _scanner_bytes(walk: Pass, plan: Schedule, dtype: torch.dtype) -> int:
    """Window buffers, delay lines and the results alive within a step, at the worst moment."""
    lines = plan_lines(walk, plan)
    order = {stage.node: index for index, stage in enumerate(walk.stages)}
    windows = 0
    delays = np.zeros(plan.steps, np.int64)
    alive = np.zeros((len(walk.stages) + 1, plan.steps), np.int64)
    for index, stage in enumerate(walk.stages):
        line, size = lines[stage.node], row_bytes(stage, dtype)
        fresh = np.diff(plan.made[stage.node]) * size
        windows += line.capacity * size * (stage.shape[-1] + sum(line.columns)) // stage.shape[-1]
        if line.delayed:
            delays += (plan.made[stage.node][1:] - line.delay_keep[:-1]) * size
        elif stage.node in walk.given or _takes_memory(stage, line, walk, lines):
            last = order[line.last_reader] if line.last_reader is not None else index
            alive[index : last + 1] += fresh
    return windows + int((delays + alive.max(0)).max())


def _takes_memory(stage: Stage, line: LinePlan, walk: Pass, lines: dict[fx.Node, LinePlan]) -> bool:
    """Whether fresh rows stand in memory of their own, not in a buffer, a view or the input's place."""
    if stage.node.op == "call_function" and operator_name(stage.node) in _VIEWS:
        return False
    if stage.writer is not None and _has_place(line, lines):
        return False
    source = overwritten_input(stage)
    return source is None or source in walk.given or not lines[source].private or lines[source].capacity > 0


def _has_place(line: LinePlan, lines: dict[fx.Node, LinePlan]) -> bool:
    """Whether its rows are made where they are read."""
    if line.delayed or line.capacity:
        return not line.delayed
    return line.part_of is not None and _has_place(lines[line.part_of[0].node], lines)
