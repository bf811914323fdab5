"""`--memory`, divided: what the process and its optimiser hold, and what is left for a scene."""

from dataclasses import dataclass

import torch
from torch import nn

from bigvision.jobs.process.options import parse_bytes
from bigvision.jobs.process.planning import PROCESS_BYTES
from bigvision.jobs.process.stream import program_of, streamed_bytes
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.streaming.backward import Budget
from bigvision.streaming.checkpoints import Scratch

_MOMENTS = {"sgd": 1, "nesterov": 1}  # that an optimiser keeps for each weight; 2 where it isn't listed


@dataclass(frozen=True)
class Memory:
    """The bytes a process may take at its peak, and those it takes before it reads a scene.

    Both are constants of the command, never measured: a run that goes on plans as it did before, and ends
    with the same bytes.
    """

    asked: str
    taken: int
    scratch: Scratch | None

    @property
    def left(self) -> int:
        """Bytes for streaming a scene."""
        return max(parse_bytes(self.asked) - self.taken, 0)

    def budget(self, rows: int | None) -> Budget:
        """Of a gradient over a whole scene."""
        return Budget(rows, self.left, self.scratch)

    def rows_to_stream(self, model: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        """Image rows a step with which a scene [C, H, W] can be streamed forward.

        Raises:
            ValueError: none fits; it says the least that does.
        """
        name = str(dtype).removeprefix("torch.")
        for rows, needed in streamed_bytes(*program_of(model, shape, name), name):
            if needed <= self.left:
                return rows
        raise self.too_little(f"streaming {shape[2]} columns", needed)

    def too_little(self, what: str, needed: int) -> ValueError:
        """The error for something that needs more than is left."""
        return ValueError(
            f"--memory {self.asked} can't be met: {what} takes {_gib(needed)} beside the {_gib(self.taken)} "
            f"of the process; at least --memory {-(-(needed + self.taken) // 2**20)}MiB is needed"
        )


def divided_memory(options: TrainOptions, model: nn.Module) -> Memory:
    """What the options give, less the process and the optimiser's moments."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    taken = PROCESS_BYTES + _MOMENTS.get(options.optimizer, 2) * weights
    scratch = None
    if options.scratch is not None:
        scratch = Scratch(options.scratch, parse_bytes(options.scratch_limit))
    return Memory(options.memory, taken, scratch)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
