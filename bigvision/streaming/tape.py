"""One row step with a tape: what it gave, differentiated by everything that it read.

A step reads the image, the line buffers that the step above left, and held values (weights, statistics and
what is computed from them). Its results are seeded: the rows of the output by the loss, the line buffers by
the step below (which was differentiated first), the sums of statistics by the passes that used them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bigvision.streaming.program import Pass, Program
from bigvision.streaming.scan import Lines, StepResult, step
from bigvision.streaming.schedule import Schedule
from bigvision.streaming.statistics import Sums

Held = dict[fx.Node, Any]
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
    """What depends on a parameter that wants a gradient."""
    tensors = program.traced.tensors
    active: set[fx.Node] = set()
    for node in program.traced.graph.nodes:
        if node in tensors:
            wanted = tensors[node].requires_grad
        else:
            wanted = any(source in active for source in node.all_input_nodes)
        if wanted and node.op != "output":
            active.add(node)
    return active


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

    Attributes:
        walk, plan: the pass and its schedule.
        held: what it reads, as leaves.
        wholes: its statistics' sums over the whole image; `sum_seeds` their gradients (None: none).
        output_seeds: the seeded loss sums of a step's output rows.
        active: nodes that need gradients.
    """

    walk: Pass
    plan: Schedule
    held: Leaves
    wholes: dict[fx.Node, Sums]
    sum_seeds: dict[fx.Node, list[Tensor | None]]
    output_seeds: Callable[[StepResult], Seeded]
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
        """
        floating = {node for node, line in lines.items() if node in self.active and line.is_floating_point()}
        given = {node: lines[node].detach().requires_grad_() for node in floating}
        with torch.enable_grad():
            done = step(self.walk, self.plan, t, image, lines | given, self.held.values, self.wholes)
            seeded = self.output_seeds(done) + self._sums(done)
        seeded += [(done.lines[node], seed) for node, seed in below.items()]
        leaves: dict[Any, Tensor] = {**given, **self.held.leaves}
        del done
        found = differentiate(seeded, leaves)
        del seeded
        self._check(t, found)
        for key in self.held.leaves:
            if key in found:
                gradients.add(key, found[key])
        return {node: found[node] for node in given if node in found}

    def _sums(self, done: StepResult) -> Seeded:
        pairs = [
            (part, seed)
            for node, taken in done.sums.items()
            for part, seed in zip(taken, self.sum_seeds.get(node, [None] * len(taken)), strict=True)
        ]
        return [(part, seed.to(part)) for part, seed in pairs if seed is not None]

    def _check(self, t: int, found: dict[Any, Tensor]) -> None:
        for key, gradient in found.items():
            if not bool(torch.isfinite(gradient).all()):
                name = key[0].name if isinstance(key, tuple) else key.name
                pace = self.plan.made[self.walk.stages[0].node]
                raise NonFiniteError(
                    f"the gradient of {name} is not finite at step {t} of {self.plan.steps}, "
                    f"image rows {int(pace[t])}..{int(pace[t + 1])}"
                )
