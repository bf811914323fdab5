"""The ranks of a face job: one machine's or several machines', and how their errors read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigvision.ranks import Failure, Ranks, RanksError


class FaceJobError(RanksError):
    """A failure that every rank has been told of; the text names the rank it happened on.

    `transient` says that the same run may well get further when it is started again (a drive that went away).
    """

    def __init__(self, text: str, transient: bool = False) -> None:
        super().__init__(text)
        self.transient = transient


@dataclass(frozen=True)
class World(Ranks):
    """This process among the ranks of a run."""

    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def complaint(self, doing: str, failed: Mapping[int, Failure]) -> FaceJobError:
        """`FaceJobError`, naming the first rank that failed, or all where all failed alike."""
        rank, first = next(iter(failed.items()))
        same = len(failed) == self.size and len(set(failed.values())) == 1
        who = "" if self.size == 1 else ("on every rank, " if same else f"on rank {rank}, ")
        return FaceJobError(f"{who}{doing}: {first.text}", first.transient)

    def described(self, error: Exception) -> Failure:
        """The error as one sentence, and whether it lies in the machine rather than in what was asked for."""
        return Failure(
            _sentence(error), type(error).__name__, isinstance(error, ValueError), _may_pass(error)
        )


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
            None,
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
