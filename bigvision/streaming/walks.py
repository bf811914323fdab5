"""One pass over a scene, down with some of its states kept, and back up differentiated.

Legend: H, W rows and columns of the scene; t step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bigvision.streaming.buffers import Scanner
from bigvision.streaming.checkpoints import CheckpointPlan, Scratch, advance, first_states
from bigvision.streaming.losses import Loss
from bigvision.streaming.program import Program
from bigvision.streaming.row_store import GivenRows
from bigvision.streaming.scan import Lines, StepResult
from bigvision.streaming.schedule import Schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.states import StateStack, compact
from bigvision.streaming.tape import Gradients, Held, TapedWalk
from bigvision.streaming.targets import TargetRows


@dataclass(frozen=True)
class Scene:
    """Everything that one gradient step reads."""

    program: Program
    image: ImageRows
    target: TargetRows
    loss: Loss
    plans: tuple[CheckpointPlan, ...]
    schedules: tuple[Schedule, ...]
    scratch: Scratch | None
    active: set[fx.Node]
    size: tuple[int, int]

    @property
    def image_level(self) -> bool:
        """The network gives one answer for the image."""
        return self.program.output not in self.program.stages

    def scanner(self, index: int, held: Held) -> Scanner:
        """Pass `index` from its beginning."""
        image = self.image
        given = GivenRows(self.program.traced.image, image)
        return Scanner(
            self.program.passes[index], self.schedules[index], held, given, image.dtype, image.device
        )

    def rows(self, index: int, t: int) -> Tensor:
        """The image rows that step `t` of pass `index` takes."""
        pace = self.schedules[index].made[self.program.passes[index].stages[0].node]
        return self.image.read(int(pace[t]), int(pace[t + 1]))

    def counted(self, y: Tensor, row: int) -> tuple[Tensor, Tensor] | None:
        """What counts of the output rows `y` from `row` on, and its truth; None where nothing does."""
        if row >= self.size[0]:
            return None
        y, truth = self.target.select(y[..., : self.size[0] - row, : self.size[1]], row)
        return (y, truth) if truth.numel() else None


@torch.no_grad()
def walk_down(
    scene: Scene, index: int, held: Held, stack: StateStack, see: Callable[[StepResult], None] | None
) -> None:
    """Walk a pass, keeping the first states; without `see` no further than the last of them."""
    plan = scene.schedules[index]
    scanner = scene.scanner(index, held)
    states = first_states(plan.steps, scene.plans[index].kept)
    for t in range(plan.steps):
        if t == (states[len(stack)] if len(stack) < len(states) else None):
            stack.push(t, scanner.state(t))
            if see is None and t == states[-1]:
                return
        done = scanner.advance(t)
        if see is not None:
            see(done)


def walk_up(
    scene: Scene, index: int, taped: TapedWalk, held: Held, stack: StateStack, gradients: Gradients
) -> None:
    """Walk a pass back from below, recomputing the states that were not kept."""
    end = scene.schedules[index].steps
    below: Lines = {}
    while len(stack):
        lines, start = _state_before(scene, index, held, stack, end - 1)
        below = taped.back(end - 1, scene.rows(index, end - 1), lines, below, gradients)
        if start == end - 1:
            stack.pop()
        end -= 1


@torch.no_grad()
def _state_before(scene: Scene, index: int, held: Held, stack: StateStack, target: int) -> tuple[Lines, int]:
    """The state before step `target`, and where the top of the stack is; new states are kept on the way."""
    lines, start = stack.read(), stack.top
    if start == target:
        return lines, start
    here, room = start, scene.plans[index].kept - len(stack) + 1
    scanner = scene.scanner(index, held).restore(here, lines)
    while here < target:
        goal = here + advance(target + 1 - here, room)
        for t in range(here, goal):
            scanner.advance(t)
        here = goal
        if room > 1:
            stack.push(here, scanner.state(here))
            start, room = here, room - 1
    return compact(scanner.state(target)), start
