"""Data parallelism by averaging gradients over the ranks of `torchrun`; a single process is one rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average_gradients(self, model: nn.Module, weight: float) -> float:
        """Replace gradients by their mean over the ranks weighted by `weight`; returns the weights' sum.

        All gradients travel as one vector. A rank without a share of this step has weight 0.
        """
        if self.world == 1:
            return weight
        grads = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float() for p in grads]
            + [torch.ones(1, device=self.device)]
        )
        flat = self.total(flat * weight)
        total = float(flat[-1])
        start = 0
        for p in grads:
            p.grad = (flat[start : start + p.numel()] / total).view_as(p).to(p.dtype)
            start += p.numel()
        return total

    def average_buffers(self, model: nn.Module) -> None:
        """Make the running statistics of all ranks alike: their mean."""
        if self.world == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.total(buffer / self.world))


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of this run, from torchrun's environment; "auto" takes a GPU a rank where there is one."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, place)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()
