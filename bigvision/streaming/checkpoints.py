"""Which states to keep on the way down a scene, so that the way back recomputes as little as the budget
allows.

A pass of n steps is differentiated from below. Step t needs the line buffers that step t - 1 left, its
state. With s states kept at once, repeating r forward steps at most reaches C(s + r, s) steps, and the
binomial schedule of Griewank and Walther (ACM TOMS 26(1), 2000, algorithm 799 "revolve") is optimal: no
other repeats fewer. State 0 is empty and costs nothing.

Legend: n steps, s states kept at once (state 0 among them), r repetitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


class BudgetError(ValueError):
    """Nothing fits the memory and scratch budget; the message says the least that does.

    least: that, in bytes.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Scratch:
    """A folder for spilled states and the bytes that they may take there."""

    folder: Path
    limit: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if self.limit < 0:
            raise ValueError(f"a scratch folder's byte limit can't be {self.limit}")


@dataclass(frozen=True)
class CheckpointPlan:
    """How one pass is differentiated.

    Attributes:
        rows: image rows a step.
        steps: n.
        in_memory, on_disk: states kept at once (state 0, which is empty, not counted).
        recomputed: forward steps done again, on top of the first pass and of every step's own tape.
        state_bytes: of the largest state.
        peak_bytes: predicted: what a step with a tape takes, and the states in memory.
        disk_bytes: predicted, at most.
    """

    rows: int
    steps: int
    in_memory: int
    on_disk: int
    recomputed: int
    state_bytes: int
    peak_bytes: int
    disk_bytes: int

    @property
    def kept(self) -> int:
        """s: states kept at once, state 0 among them."""
        return 1 + self.in_memory + self.on_disk

    @property
    def spacing(self) -> float:
        """Steps between two states that the first pass keeps, on average."""
        return self.steps / min(self.kept, self.steps)

    @property
    def recomputation(self) -> float:
        """Forward passes done again, as a share of one."""
        return self.recomputed / self.steps


@dataclass(frozen=True)
class StepBytes:
    """What the steps of a pass take at some number of rows a step.

    Attributes:
        rows, steps: image rows a step, and how many steps.
        state: bytes of the largest state.
        working: bytes while a step is differentiated: weights, gradients, tape, states above and below.
    """

    rows: int
    steps: int
    state: int
    working: int


def plan_checkpoints(choices: list[StepBytes], memory: int | None, scratch: int = 0) -> CheckpointPlan:
    """The choice with the least recomputation under both budgets (fewer steps where equal).

    Args:
        choices: rows a step that may be taken.
        memory: bytes of the process; None: every state is kept in memory.
        scratch: bytes of the scratch folder, 0 without one.

    Raises:
        BudgetError: nothing fits.
    """
    fitting = [one for one in choices if memory is None or one.working <= memory]
    if not fitting:
        least = min(choices, key=lambda one: one.working)
        raise BudgetError(
            f"a memory budget of {_size(memory or 0)} can't hold one differentiated step: "
            f"with {rows_a_step(least.rows)} it takes {_size(least.working)}",
            least.working,
        )
    plans = [_plan(one, memory, scratch) for one in fitting]
    return min(plans, key=lambda plan: (plan.recomputation, plan.on_disk, plan.steps))


def _plan(one: StepBytes, memory: int | None, scratch: int) -> CheckpointPlan:
    wanted = one.steps - 1
    unit = max(one.state, 1)
    in_memory = wanted if memory is None else min(wanted, (memory - one.working) // unit)
    on_disk = min(wanted - in_memory, scratch // unit)
    return CheckpointPlan(
        rows=one.rows,
        steps=one.steps,
        in_memory=in_memory,
        on_disk=on_disk,
        recomputed=recomputed_steps(one.steps, 1 + in_memory + on_disk),
        state_bytes=one.state,
        peak_bytes=one.working + in_memory * one.state,
        disk_bytes=on_disk * one.state,
    )


def recomputed_steps(n: int, s: int) -> int:
    """Forward steps that differentiating n steps repeats, after a first pass that kept s states.

    Griewank and Walther's t(n, s) = r*n - C(s + r, r - 1), less the first pass's own n - 1.
    """
    if n <= 1:
        return 0
    r = _repetitions(n, s)
    return r * n - math.comb(s + r, r - 1) - (n - 1)


def first_states(n: int, s: int) -> list[int]:
    """The steps before which the first pass keeps its state, from 0 on."""
    states = [0]
    while n - states[-1] > 1 and len(states) < s:
        states.append(states[-1] + advance(n - states[-1], s - len(states) + 1))
    return states


def advance(n: int, s: int) -> int:
    """How far to go, out of n > 1 steps, before the next of s states (the one at hand counted) is kept.

    With s = 1 nothing more can be kept: the last of the n steps is reached at once.
    """
    if s == 1:
        return n - 1
    r = _repetitions(n, s)
    # Any split with both parts reachable in as few repetitions is optimal; the later part is made small.
    return min(math.comb(s + r - 1, s), n - math.comb(s + r - 2, s - 1))


def _repetitions(n: int, s: int) -> int:
    """The least r with C(s + r, s) >= n."""
    r = 1
    while math.comb(s + r, s) < n:
        r += 1
    return r


def rows_a_step(rows: int) -> str:
    """`1 row a step`, `64 rows a step`."""
    return f"{rows} row{'s' if rows > 1 else ''} a step"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
