"""Data parallelism by averaging gradients over the ranks of `torchrun`; a single process is one rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from bigvision import ranks


@dataclass(frozen=True)
class Ranks(ranks.Ranks):
    """This process among those of a training, and its device."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def average_gradients(self, model: nn.Module, weight: float) -> float:
        """Replace gradients by their mean over the ranks weighted by `weight`; returns the weights' sum.

        All gradients travel as one vector. A rank without a share of this step has weight 0.
        """
        if self.size == 1:
            return weight
        grads = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float() for p in grads]
            + [torch.ones(1, device=self.device)]
        )
        flat = self.sum_(flat * weight)
        total = float(flat[-1])
        start = 0
        for p in grads:
            p.grad = (flat[start : start + p.numel()] / total).view_as(p).to(p.dtype)
            start += p.numel()
        return total

    def average_buffers(self, model: nn.Module) -> None:
        """Make the running statistics of all ranks alike: their mean."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.sum_(buffer / self.size))


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of this run, from torchrun's environment; "auto" takes a GPU a rank where there is one."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(device=place)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, device=place)
    finally:
        dist.destroy_process_group()
