"""The processes of a run, and what they tell each other: sums, values, and errors that all raise together.

A rank that fails alone would leave the others waiting in a collective. So what may fail on one is run
`together`, and input is compared by `same` before work starts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RanksError(ValueError):
    """A failure that every rank has been told of."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank: the error's text and kind, whether that is a ValueError, and whether it
    lies in the machine, so that the same run may well get further when it is started again.
    """

    text: str
    kind: str
    refusal: bool
    transient: bool


@dataclass(frozen=True)
class Ranks:
    """This process among those of a group (None: the default group, or a process alone)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> Self:
        """As torch.distributed says. Raises ValueError where this process is none of the group's."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1)
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group it was given")
        return cls(rank, dist.get_world_size(group), group)

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        return self._reduce_(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        return self._reduce_(x, dist.ReduceOp.MAX)

    def _reduce_(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, op=operation, group=self.group)
        return x

    def gather_rows(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks (equal shapes), in the order of the ranks."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def gather(self, value: T) -> list[T]:
        """The small values of all ranks, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: float) -> float:
        """Sum of a number over the ranks."""
        return float(sum(self.gather(value)))

    def same(self, name: str, value: object) -> None:
        """Raises RanksError on every rank unless all ranks hold the same value."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            held = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise RanksError(f"{name} must be the same on every rank, got {held}")

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def agree(self, failure: Exception | None, doing: str, *, stop: bool = False) -> bool:
        """Whether any rank was told to `stop`; one small all-reduce.

        Raises the one error of `complaint` on all ranks if any has a failure.
        """
        if self.size > 1:
            flags = torch.tensor([failure is not None, stop], dtype=torch.int32, device=self._device())
            failing, stop = (bool(flag) for flag in self.max_(flags).tolist())
            if not failing:
                return stop
        elif failure is None:
            return stop
        told = self.gather(None if failure is None else self.described(failure))
        failed = {rank: found for rank, found in enumerate(told) if found is not None}
        raise self.complaint(doing, failed) from failure

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Runs the block on all ranks; if any fails, all raise the same error, which names the first.

        The block must not leave a collective half done: it either has none, or fails before them.
        """
        failure: Exception | None = None
        try:
            yield
        except RanksError:
            raise  # told to all ranks already
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = error
        self.agree(failure, doing)

    def complaint(self, doing: str, failed: Mapping[int, Failure]) -> Exception:
        """The error that all ranks raise where some have failed at `doing`."""
        rank, first = next(iter(failed.items()))
        text = first.text if first.refusal else f"rank {rank}: {first.kind}: {first.text}"
        return RanksError(f"{doing}: {text}")

    def described(self, error: Exception) -> Failure:
        """What the other ranks are told of an error."""
        transient = isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, PermissionError))
        return Failure(str(error), type(error).__name__, isinstance(error, ValueError), transient)

    def _device(self) -> torch.device | str:
        """Where a flag must be to travel."""
        gloo = "gloo" in str(dist.get_backend(self.group))
        return "cpu" if gloo else torch.device("cuda", torch.cuda.current_device())
