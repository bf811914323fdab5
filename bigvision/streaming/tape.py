"""One row step with a tape: what it gave, differentiated by everything that it read.

A step reads the image, the line buffers that the step above left, and held values (weights, statistics and
what is computed from them). Its results are seeded: the rows of the output by the loss, the line buffers by
the step below (which was differentiated first), the sums of statistics by the passes that used them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bigvision.graph.layout import refusal
from bigvision.graph.trace import operator_name
from bigvision.streaming.held import Held
from bigvision.streaming.program import Pass, Program, Stage
from bigvision.streaming.scan import Lines, held_rows, no_rows
from bigvision.streaming.schedule import Schedule
from bigvision.streaming.statistics import Sums

"""Weights, statistics and what is computed from them; values are tensors or tuples of them."""

Seeded = list[tuple[Tensor, Tensor]]
"""Results with their gradients."""


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or no number; the message names the step and the row."""


class Gradients:
    """Gradients of held values, summed over steps in float32 (float64 for float64)."""

    def __init__(self) -> None:
        self._sums: dict[tuple[fx.Node, int], Tensor] = {}

    def add(self, key: tuple[fx.Node, int], gradient: Tensor) -> None:
        """Add a part."""
        if key in self._sums:
            self._sums[key] += gradient
        else:
            wide = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
            self._sums[key] = gradient.to(wide, copy=True)

    def get(self, key: tuple[fx.Node, int]) -> Tensor | None:
        """The sum so far; None where nothing was added."""
        return self._sums.get(key)

    def pop(self, node: fx.Node, count: int) -> list[Tensor | None]:
        """The sums of a node's `count` tensors, taken out."""
        return [self._sums.pop((node, index), None) for index in range(count)]


@dataclass(frozen=True)
class Leaves:
    """Held values as leaves of a tape.

    Attributes:
        values: by node, with a leaf in place of every tensor that needs a gradient.
        leaves: those, by node and place.
    """

    values: Held
    leaves: dict[tuple[fx.Node, int], Tensor]


def leaves_of(held: Held, active: set[fx.Node]) -> Leaves:
    """Held values as leaves where a gradient is wanted (`active`)."""
    values: Held = {}
    leaves: dict[tuple[fx.Node, int], Tensor] = {}
    for node, value in held.items():
        if node not in active:
            values[node] = value
            continue
        parts, spec = pytree.tree_flatten(value)
        for index, part in enumerate(parts):
            if isinstance(part, Tensor) and part.is_floating_point():
                parts[index] = leaves[node, index] = part.detach().requires_grad_()
        values[node] = pytree.tree_unflatten(parts, spec)
    return Leaves(values, leaves)


def active_nodes(program: Program) -> set[fx.Node]:
    """What depends on a parameter that wants a gradient, through numbers that have one."""
    tensors = program.traced.tensors
    active: set[fx.Node] = set()
    for node in program.traced.graph.nodes:
        if node in tensors:
            wanted = tensors[node].requires_grad
        else:
            passed = operator_name(node) != "detach"
            wanted = passed and any(source in active for source in node.all_input_nodes)
        if wanted and node.op != "output" and _has_floats(node):
            active.add(node)
    return active


def _has_floats(node: fx.Node) -> bool:
    return any(
        isinstance(part, Tensor) and part.is_floating_point() for part in pytree.tree_leaves(node.meta["val"])
    )


def differentiate(seeded: Seeded, leaves: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The gradients by every leaf that the seeded results depend on."""
    taped = [(value, seed) for value, seed in seeded if value.requires_grad]
    if not taped or not leaves:
        return {}
    values, seeds = zip(*taped, strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), seeds, allow_unused=True)
    return {key: gradient for key, gradient in zip(leaves, found, strict=True) if gradient is not None}


@dataclass(frozen=True)
class TapedWalk:
    """One pass, ready to be differentiated step by step from below.

    Every stage has a tape of its own, and gradients of rows add up in place in line buffers like the values':
    one tape over the whole step would fill and copy a full-size zero tensor for every slice that is read.

    Attributes:
        walk, plan: the pass and its schedule.
        held: what it reads, as leaves.
        wholes: its statistics' sums over the whole image; `sum_seeds` their gradients (None: none).
        seed_output: the gradient of a step's output rows, given them and the first one's number (None: none).
        active: nodes that need gradients.
    """

    walk: Pass
    plan: Schedule
    held: Leaves
    wholes: dict[fx.Node, Sums]
    sum_seeds: dict[fx.Node, list[Tensor | None]]
    seed_output: Callable[[Tensor, int], Tensor | None]
    active: set[fx.Node]

    def back(self, t: int, image: Tensor, lines: Lines, below: Lines, gradients: Gradients) -> Lines:
        """Differentiate step `t`; add to `gradients`, and give the gradients of the line buffers it read.

        Args:
            t: the step.
            image: the image rows that it reads.
            lines: the line buffers that step t - 1 left.
            below: gradients of the line buffers that step t leaves.
            gradients: of the held values.

        Raises:
            NonFiniteError: a gradient is infinite or no number.
            UnsupportedOperatorError: an operator has no derivative on this device.
        """
        tapes = self._forward(t, image, lines)
        rows: dict[fx.Node, LineGradient] = {}
        for stage in self.walk.stages:
            made, kept = self.plan.made[stage.node], self.plan.kept[stage.node]
            rows[stage.node] = LineGradient(stage.axis, int(kept[t]), int(made[t + 1]))
            if stage.node in below:
                rows[stage.node].add(int(kept[t + 1]), below.pop(stage.node))
        above: Lines = {}
        for stage in reversed(self.walk.stages):
            a = int(self.plan.made[stage.node][t])
            tape = tapes.pop(stage.node, None)
            if tape is not None:
                self._seed(stage, tape, a, rows[stage.node])
            before, own = rows.pop(stage.node).parts(a)
            if before is not None:
                above[stage.node] = before
            if tape is not None and tape.active and (own is not None or isinstance(tape.rows, tuple)):
                self._back_through(stage, tape, own, t, rows, tapes, gradients)
        return above

    def _forward(self, t: int, image: Tensor, lines: Lines) -> dict[fx.Node, Tape]:
        """Run the step, every stage on a tape of its own."""
        current: dict[fx.Node, Any] = dict(lines)
        tapes: dict[fx.Node, Tape] = {}
        for stage in self.walk.stages:
            node = stage.node
            a, b = int(self.plan.made[node][t]), int(self.plan.made[node][t + 1])
            if a == b:
                continue
            if stage is self.walk.stages[0]:
                tape = Tape(image, {}, {}, False)
            else:
                tape = self._record(stage, a, b, t, current, image)
            tapes[node] = tape
            fresh = pytree.tree_map(torch.detach, tape.rows)
            current[node] = torch.cat([current[node], fresh], stage.axis) if node in current else fresh
        return tapes

    def _record(
        self, stage: Stage, a: int, b: int, t: int, current: dict[fx.Node, Any], image: Tensor
    ) -> Tape:
        span = stage.span(a, b)
        inputs: dict[fx.Node, Any] = {}
        first: dict[fx.Node, int] = {}

        def read(source: fx.Node) -> Any:
            line = current[source] if source in current else no_rows(source, stage.input_axis, image)
            if isinstance(line, tuple):  # an operator with several results, consumed row for row
                return tuple(self._leaf(source, part) for part in line)
            start, stop = span.read
            first[source] = start
            at = start - int(self.plan.kept[source][t])
            return self._leaf(source, line.narrow(stage.input_axis, at, stop - start))

        def values(source: fx.Node) -> Any:
            if source not in stage.inputs:
                return held_rows(stage, span, self.held.values[source])
            if source not in inputs:
                inputs[source] = read(source)
            return inputs[source]

        active = stage.node in self.active
        with torch.set_grad_enabled(active):
            return Tape(stage.kernel(values, span), inputs, first, active)

    def _leaf(self, source: fx.Node, rows: Tensor) -> Tensor:
        return rows.detach().requires_grad_(source in self.active and rows.is_floating_point())

    def _seed(self, stage: Stage, tape: Tape, a: int, rows: LineGradient) -> None:
        """What the loss and the statistics ask of a stage's new rows."""
        if stage.node not in self.active:
            return
        if stage is self.walk.output:
            gradient = self.seed_output(tape.rows, a)
            if gradient is not None:
                rows.add(a, gradient)
        for one in self.walk.statistics:
            seeds = self.sum_seeds.get(one.node)
            if one.source is not stage.node or seeds is None:
                continue
            leaf = tape.rows.detach().requires_grad_()
            with torch.enable_grad():
                sums = one.differentiable_partial(leaf, a, self.wholes[one.node])
            pairs = [
                (part, seed.to(part)) for part, seed in zip(sums, seeds, strict=True) if seed is not None
            ]
            found = differentiate(pairs, {None: leaf})
            if found:
                rows.add(a, found[None])

    def _back_through(
        self,
        stage: Stage,
        tape: Tape,
        own: Tensor | None,
        t: int,
        rows: dict[fx.Node, LineGradient],
        tapes: dict[fx.Node, Tape],
        gradients: Gradients,
    ) -> None:
        """From a stage's rows back to the rows that it read and to the held values."""
        if isinstance(tape.rows, tuple):
            seeded = [
                (part, tape.parts[place]) for place, part in enumerate(tape.rows) if place in tape.parts
            ]
        else:
            assert own is not None
            seeded = [(tape.rows, own)]
        leaves: dict[Any, Tensor] = {}
        for source, value in tape.inputs.items():
            for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if part.requires_grad:
                    leaves[source, place, "rows"] = part
        held = {stage.node, *stage.node.all_input_nodes} - set(tape.inputs)
        leaves |= {key: leaf for key, leaf in self.held.leaves.items() if key[0] in held}
        try:
            found = differentiate(seeded, leaves)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise refusal(stage.node, "it has no derivative") from error
        for key, gradient in found.items():
            source, place = key[:2]
            if len(key) == 2:
                self._require_finite(t, source, gradient)
                gradients.add(key, gradient)
            elif isinstance(tape.inputs[source], tuple):
                tapes[source].add(place, gradient)
            else:
                rows[source].add(tape.first[source], gradient)

    def _require_finite(self, t: int, node: fx.Node, gradient: Tensor) -> None:
        if not math.isfinite(float(gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)))):
            pace = self.plan.made[self.walk.stages[0].node]
            raise NonFiniteError(
                f"the gradient of {node.name} is not finite at step {t} of {self.plan.steps}, "
                f"image rows {int(pace[t])}..{int(pace[t + 1])}"
            )


@dataclass
class Tape:
    """One stage's new rows in one step.

    Attributes:
        rows: the result (a tuple where the operator has several), with its tape.
        inputs: the rows that were read, as leaves; `first` the number of the first of them.
        active: whether a gradient is wanted.
        parts: gradients of a tuple's parts.
    """

    rows: Any
    inputs: dict[fx.Node, Any]
    first: dict[fx.Node, int]
    active: bool
    parts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, place: int, gradient: Tensor) -> None:
        """Add to the gradient of a tuple's part: several readers may name the same one."""
        self.parts[place] = self.parts[place] + gradient if place in self.parts else gradient


class LineGradient:
    """The gradient of one stage's rows start..stop, added up from what its readers give."""

    def __init__(self, axis: int, start: int, stop: int) -> None:
        self._axis, self._start, self._stop = axis, start, stop
        self._sum: Tensor | None = None
        self._shared = False

    def add(self, first: int, gradient: Tensor) -> None:
        """Add the gradient of the rows from `first` on."""
        count, before = gradient.shape[self._axis], first - self._start
        if not count:
            return
        if self._sum is None:
            if count == self._stop - self._start:
                self._sum, self._shared = gradient, True  # perhaps another reader's too
                return
            self._sum = self._placed(before, gradient)
        elif self._shared:
            self._sum, self._shared = self._sum.clone(memory_format=torch.preserve_format), False
            self._sum.narrow(self._axis, before, count).add_(gradient)
        else:
            self._sum.narrow(self._axis, before, count).add_(gradient)

    def parts(self, a: int) -> tuple[Tensor | None, Tensor | None]:
        """(the rows before a, a copy; the rows from a on), None where nothing was added or there are none."""
        if self._sum is None:
            return None, None
        old, new = a - self._start, self._stop - a
        above = (
            self._sum.narrow(self._axis, 0, old).clone(memory_format=torch.preserve_format) if old else None
        )
        return above, self._sum.narrow(self._axis, old, new) if new else None

    def _placed(self, before: int, gradient: Tensor) -> Tensor:
        """Rows start..stop with the gradient in its place and zeros around it."""
        count, rows = gradient.shape[self._axis], self._stop - self._start
        shape = list(gradient.shape)
        shape[self._axis] = rows
        last = len(shape) == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        full = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout)
        full.narrow(self._axis, 0, before).zero_()
        full.narrow(self._axis, before, count).copy_(gradient)
        full.narrow(self._axis, before + count, rows - before - count).zero_()
        return full
