"""Errors that all ranks raise together: a rank that fails alone would leave the others waiting in a
collective."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class FaceJobError(ValueError):
    """A failure that every rank has been told of; the text names the rank it happened on.

    `transient` says that the same run may well get further when it is started again (a drive that went away).
    """

    def __init__(self, text: str, transient: bool = False) -> None:
        super().__init__(text)
        self.transient = transient


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, value: float) -> float:
        """Sum of a number over the ranks."""
        return float(sum(self.gather(value)))

    def agree(self, failure: Exception | None, doing: str, *, stop: bool = False) -> bool:
        """Whether any rank was told to `stop`; one small all-reduce.

        Raises `FaceJobError` on all ranks, naming rank and error, if any has a failure.
        """
        if self.size > 1:
            flags = torch.tensor([failure is not None, stop], dtype=torch.int32, device=self.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            failing, stop = (bool(flag) for flag in flags.tolist())
            if not failing:
                return stop
        elif failure is None:
            return stop
        told = self.gather(None if failure is None else (_sentence(failure), _may_pass(failure)))
        failed = {rank: found for rank, found in enumerate(told) if found is not None}
        rank, (text, transient) = next(iter(failed.items()))
        same = len(failed) == self.size and len(set(failed.values())) == 1
        who = "" if self.size == 1 else ("on every rank, " if same else f"on rank {rank}, ")
        raise FaceJobError(f"{who}{doing}: {text}", transient) from failure

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a block on all ranks; if any fails, all raise `FaceJobError` with the rank and its error.

        The block must not leave a collective half done: it either has none, or fails before them.
        """
        failure: Exception | None = None
        try:
            yield
        except FaceJobError:
            raise  # told to all ranks already
        except Exception as error:
            failure = error
        self.agree(failure, doing)


def _may_pass(error: Exception) -> bool:
    """Whether an error lies in the machine rather than in what was asked for: a drive, a network, a device, a
    process of ours that the system killed, memory that others took."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    lost_worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    return lost_worker or isinstance(error, MACHINE)


MACHINE = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    dist.DistBackendError,
    dist.DistNetworkError,
)


def _sentence(error: Exception) -> str:
    if isinstance(error, (ValueError, OSError, FaceJobError)):
        return str(error)
    if "DataLoader worker" in str(error):
        return f"a process that decodes images was lost: {error}"
    return f"{type(error).__name__.removesuffix('Error')}: {error}"


@contextmanager
def world_of_torchrun(device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """The ranks that torchrun started (gloo on CPU, nccl on GPU), or this process alone."""
    if "RANK" not in os.environ:
        yield World(device=device)
        return
    number = {name: int(os.environ.get(name, default)) for name, default in VARIABLES.items()}
    if device.type == "cuda":
        torch.cuda.set_device(number["LOCAL_RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, **_meeting_place(number))
    try:
        yield World(
            number["RANK"],
            number["WORLD_SIZE"],
            number["LOCAL_RANK"],
            number["LOCAL_WORLD_SIZE"],
            number["TORCHELASTIC_RESTART_COUNT"],
            torch.device("cuda", number["LOCAL_RANK"]) if device.type == "cuda" else device,
        )
    finally:
        dist.destroy_process_group()


def _meeting_place(number: dict[str, int]) -> dict[str, Any]:
    """Where ranks of one machine find each other: a file that only its user can read, rather than a port."""
    folder = os.environ.get(RENDEZVOUS)
    if folder is None:
        return {}
    file = Path(folder) / f"ranks-{number['TORCHELASTIC_RESTART_COUNT']}"
    size = number["WORLD_SIZE"]
    return {"store": dist.FileStore(str(file), size), "rank": number["RANK"], "world_size": size}


RENDEZVOUS = "BIGVISION_RENDEZVOUS"
VARIABLES = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
