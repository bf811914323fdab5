"""`--memory`, divided: what the process and its optimiser hold, and what is left for a scene."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bigvision.jobs.process.options import parse_bytes
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.streaming.checkpoints import BudgetError, CheckpointPlan, Scratch
from bigvision.streaming.forecast import (
    PROCESS_BYTES,
    Beside,
    Budget,
    forward_rows,
    plan_backward,
    training_row_bytes,
)
from bigvision.streaming.model import StreamedModel
from bigvision.streaming.program import Program
from tiling.memory import CACHE_BYTES

_MOMENTS = {"sgd": 1, "nesterov": 1}  # that an optimiser keeps for each weight; 2 where it isn't listed


class TooLittleMemoryError(ValueError):
    """`--memory` can't hold what it must; `least`: the bytes that can."""

    def __init__(self, asked: str, what: str, least: int) -> None:
        super().__init__(
            f"--memory {asked} can't be met: {what} takes {least / 2**30:.2f} GiB, the process's own "
            f"included; at least --memory {-(-least // 2**20)}MiB is needed"
        )
        self.least = least


@contextmanager
def most_demanding() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Of several `attempt()` blocks that lack memory, the one that needs most fails, after all were tried.

    Whoever gives what its message names is refused by none of the others.
    """
    refused: list[TooLittleMemoryError] = []

    @contextmanager
    def attempt() -> Iterator[None]:
        try:
            yield
        except TooLittleMemoryError as error:
            refused.append(error)

    yield attempt
    if refused:
        raise max(refused, key=lambda error: error.least)


@dataclass(frozen=True)
class Memory:
    """The bytes a process may take at its peak, and those it takes before it reads a scene.

    Both are constants of the command, never measured: a run that goes on plans as it did before, and ends
    with the same bytes. `bigvision plan` asks here, too.
    """

    asked: str
    taken: int
    scratch: Scratch | None

    def beside(self, shape: tuple[int, int, int], pixels: np.dtype[Any]) -> Beside:
        """What the process holds beside the stream of a scene [C, H, W], stored as such pixels."""
        row = training_row_bytes(shape[0], shape[2], pixels.itemsize, floating=pixels.kind == "f")
        return Beside(self.taken, row)

    def budget(self, rows: int | None, shape: tuple[int, int, int], pixels: np.dtype[Any]) -> Budget:
        """Of a gradient over a whole scene [C, H, W]."""
        return Budget(rows, parse_bytes(self.asked), self.scratch).less(self.beside(shape, pixels))

    def plan_step(
        self,
        program: Program,
        dtype: torch.dtype,
        rows: int | None,
        shape: tuple[int, int, int],
        pixels: np.dtype[Any],
        what: str,
    ) -> tuple[CheckpointPlan, ...]:
        """How a gradient over a scene [C, H, W] is taken; TooLittleMemoryError names `what` if it can't."""
        try:
            return plan_backward(program, dtype, self.budget(rows, shape, pixels))
        except BudgetError as error:
            raise TooLittleMemoryError(self.asked, what, self.taken + error.least) from error

    def rows_to_stream(
        self, streamed: StreamedModel, rows: int | None, shape: tuple[int, int, int], pixels: np.dtype
    ) -> int:
        """Image rows a step with which a scene [C, H, W] is streamed; TooLittleMemoryError if none."""
        beside, most = self.beside(shape, pixels), parse_bytes(self.asked)
        try:
            return forward_rows(streamed.inference, streamed.stride, streamed.dtype, beside, most, rows)[0]
        except BudgetError as error:
            raise TooLittleMemoryError(self.asked, f"streaming {shape[2]} columns", error.least) from error


def divided_memory(options: TrainOptions, model: nn.Module) -> Memory:
    """What the options give, less the process, the weights and the optimiser's moments."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    taken = PROCESS_BYTES + CACHE_BYTES + (1 + _MOMENTS.get(options.optimizer, 2)) * weights
    scratch = None
    if options.scratch is not None:
        scratch = Scratch(options.scratch, parse_bytes(options.scratch_limit))
    return Memory(options.memory, taken, scratch)
