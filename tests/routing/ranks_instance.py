"""What the ranks of test_instance run: expert networks over 1, 2 and 3 processes against one process.

Run as ``python ranks_instance.py FOLDER``; exits with 0 when every rank has passed every check.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.gating import AllGatherExchange, AllToAllExchange, Gate, LinearScorer, TopK, expert_range
from bigvision.routing import InstanceRouter

WORLD, EXPERTS = 3, 4
PATIENCE = timedelta(seconds=60)  # a rank that waits longer hangs
# Images of each rank: uneven, none on the first, none on the last.
SPLITS = [(3, 1, 2), (0, 4, 1), (2, 0, 0)]
Exchange = AllToAllExchange | AllGatherExchange


def networks() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU()).double() for _ in range(EXPERTS)]


def gate() -> Gate:
    torch.manual_seed(7)
    return Gate(LinearScorer(4, EXPERTS), TopK(2)).double()


def gradients(router: InstanceRouter, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, and the gradients of the gate and of the router's experts."""
    y, gated = router.run(x)
    loss = (y * target).sum() + router.balance_loss(gated) * 0
    loss.backward()
    grads = [
        [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters()]
        for part in (router.gate, router.experts)
    ]
    return y.detach(), *grads


def check(exchange: Exchange, group: dist.ProcessGroup, split: Sequence[int]) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    split = split[:world]
    generator = torch.Generator().manual_seed(sum(split))
    x = torch.randn(sum(split), 2, 6, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(sum(split), 3, 6, 5, generator=generator, dtype=torch.float64)
    expected = gradients(InstanceRouter(gate(), networks()), x, target)
    own = expert_range(EXPERTS, rank, world)
    mine = [networks()[i] for i in own]
    here = slice(sum(split[:rank]), sum(split[: rank + 1]))
    found = gradients(InstanceRouter(gate(), mine, exchange=exchange), x[here], target[here])
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found[0], expected[0][here], **close)
    for have, want in zip(found[1], expected[1], strict=True):
        dist.all_reduce(have, group=group)  # the gate is a copy on every rank
        torch.testing.assert_close(have, want, **close)
    each = len(expected[2]) // EXPERTS
    wanted = [g for i in own for g in expected[2][i * each : (i + 1) * each]]
    for have, want in zip(found[2], wanted, strict=True):
        torch.testing.assert_close(have, want, **close)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=PATIENCE
    )
    for world in (1, 2, 3):
        group = dist.new_group(list(range(world)), timeout=PATIENCE)
        if rank < world:
            for exchange in (AllToAllExchange(group), AllGatherExchange(group)):
                for split in SPLITS if world > 1 else SPLITS[:1]:
                    check(exchange, group, split)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=tuple(sys.argv[1:]), nprocs=WORLD, start_method="fork")
