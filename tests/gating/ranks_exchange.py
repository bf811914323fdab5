"""What the ranks of test_exchange run: both exchanges over 1, 2 and 4 processes against one process.

Run as ``python ranks_exchange.py SCENARIO FOLDER``; exits with 0 when every rank has passed every check.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.gating import (
    AllGatherExchange,
    AllToAllExchange,
    BiasBalancer,
    Gate,
    LinearScorer,
    Routing,
    TopK,
    apply_experts,
    expert_range,
    load_experts,
    normalize,
    route,
    save_experts,
    top_k,
)

WORLD = 4
PATIENCE = timedelta(seconds=60)  # a rank that waits longer hangs
DIM = 3
# Tokens of each rank; groups of 1 and 2 take the first.
SPLITS = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 4, 0, 2), (6, 2, 1, 3)]
Exchange = AllToAllExchange | AllGatherExchange
Group = dist.ProcessGroup


class Outer(nn.Module):
    """Rows [n, 3] to rows [n, 2, 3]: what comes back has another shape than what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().view(len(x), 2, DIM)


def make_experts(num_experts: int) -> list[nn.Module]:
    torch.manual_seed(5)
    return [Outer().double() for _ in range(num_experts)]


def make_routing(x: Tensor, probs: Tensor, banned: Sequence[int]) -> Routing:
    """Top-2, but the banned experts get no token."""
    allowed = torch.ones_like(probs, dtype=torch.bool)
    allowed[:, list(banned)] = False
    return route(top_k(probs, 2, allowed=allowed), probs)


def forward_backward(
    apply: Callable[[Tensor, Routing], Tensor],
    x: Tensor,
    logits: Tensor,
    target: Tensor,
    banned: Sequence[int],
) -> list[Tensor]:
    """Output and the gradients of x and logits."""
    x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
    out = apply(x, make_routing(x, normalize(logits), banned))
    (out * target).sum().backward()
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, logits))]


def check_one(
    exchange: Exchange, group: Group, num_experts: int, split: Sequence[int], banned: Sequence[int]
) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    split = split[:world]
    generator = torch.Generator().manual_seed(sum(split) + num_experts)
    total = sum(split)
    x = torch.randn(total, DIM, generator=generator, dtype=torch.float64)
    logits = torch.randn(total, num_experts, generator=generator, dtype=torch.float64)
    target = torch.randn(total, 2, DIM, generator=generator, dtype=torch.float64)
    whole = make_experts(num_experts)
    expected = forward_backward(
        lambda rows, routing: apply_experts(rows, routing, whole, out_shape=(2, DIM)),
        x,
        logits,
        target,
        banned,
    )
    own = expert_range(num_experts, rank, world)
    mine = [make_experts(num_experts)[i] for i in own]
    here = slice(sum(split[:rank]), sum(split[: rank + 1]))
    got = forward_backward(
        lambda rows, routing: exchange(rows, routing, mine, out_shape=(2, DIM)),
        x[here],
        logits[here],
        target[here],
        banned,
    )
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want[here], rtol=1e-12, atol=1e-12)
    for expert, reference in zip(mine, (whole[i] for i in own), strict=True):
        for p, q in zip(expert.parameters(), reference.parameters(), strict=True):
            # An idle expert gets zeros here, where sharded optimisers reduce, and none in one process.
            want = torch.zeros_like(q) if q.grad is None else q.grad
            assert p.grad is not None
            torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-12)


def check_equals_one_process(group: Group) -> None:
    for exchange in (AllToAllExchange(group), AllGatherExchange(group)):
        for num_experts in (1, 3, 5):
            for split in SPLITS:
                check_one(exchange, group, num_experts, split, ())
            # No token at all for the first, for the last, for all experts but one.
            for banned in ((0,), (num_experts - 1,), range(num_experts - 1)):
                check_one(exchange, group, num_experts, SPLITS[0], banned)
        check_one(exchange, group, 5, SPLITS[3], range(5))


def check_bit_for_bit(group: Group) -> None:
    """All-to-all adds in the order of one process: elementwise experts give the same bits, bf16 too."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    split = SPLITS[3][:world]
    here = slice(sum(split[:rank]), sum(split[: rank + 1]))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(sum(split), DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
        logits = torch.randn(sum(split), 4, generator=torch.Generator().manual_seed(2))
        experts = [lambda rows, i=i: rows * (i + 0.3) + 0.1 for i in range(4)]
        want = apply_experts(x, make_routing(x, normalize(logits), ()), experts)[here]
        own = expert_range(4, rank, world)
        routing = make_routing(x[here], normalize(logits[here]), ())
        with torch.no_grad():
            have = AllToAllExchange(group)(x[here], routing, [experts[i] for i in own])
            near = AllGatherExchange(group)(x[here], routing, [experts[i] for i in own])
        assert have.dtype == dtype and torch.equal(have, want)
        torch.testing.assert_close(near, want)


def check_skipping_experts(group: Group) -> None:
    """Experts that ignore their rows or have no parameters: no rank leaves the others alone in backward."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    kinds: list[Callable[[Tensor], Tensor]] = [
        torch.zeros_like,
        nn.Linear(DIM, DIM),
        torch.zeros_like,
        torch.square,
    ]
    experts = [kinds[i] for i in expert_range(4, rank, world)]
    for exchange in (AllToAllExchange(group), AllGatherExchange(group)):
        for needs_grad in (True, False):
            x = torch.randn(rank, DIM, requires_grad=needs_grad)  # the first rank has none
            probs = torch.full((rank, 4), 0.25)
            out = exchange(x, route(top_k(probs, 1 + rank), probs), experts)
            assert out.requires_grad
            (out.sum() * 0).backward()


def check_refusals(group: Group) -> None:
    """A disagreement is raised on every rank, and nobody waits."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for exchange in (AllToAllExchange(group), AllGatherExchange(group)):
        mask = torch.ones(2, world, dtype=torch.bool)

        def run(
            experts: Sequence[Callable[[Tensor], Tensor]],
            dim: int = DIM,
            exchange: Exchange = exchange,
            mask: Tensor = mask,
        ) -> str:
            try:
                exchange(torch.zeros(2, dim), route(mask, mask.float()), experts)
            except (ValueError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            return "no error"

        fails = [
            lambda rows: rows if rank else rows / rows.new_zeros(7, 7)
        ]  # the first rank's shapes don't fit
        message = run(fails)
        assert message == "RuntimeError: experts failed on ranks [0]" if rank else "size of tensor" in message
        if world > 1:
            assert "ranks differ in experts, dtype or row shape" in run([torch.square], DIM + (rank == 1))
            assert "differ in what they return" in run([lambda rows: rows[:, : 1 + rank]])
            message = run([torch.square], mask=mask[: 2 - (rank == 1)])  # known to one rank alone
            assert ("the routing is of 1 tokens" if rank == 1 else "ranks [1] can't take part") in message
            assert "ranks hold [2, 1" in run([torch.square] * (1 + (rank == 0)))
        assert run([torch.square]) == "no error"  # all still in step


def check_balancer(group: Group) -> None:
    """The bias of a group is that of one process with all tokens."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    masks = torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    split, joint = BiasBalancer(3), BiasBalancer(3)
    for step in masks[:, :world]:
        split.observe(step[rank])
        split.update(group)
        joint.observe(step.flatten(0, 1))
        joint.update()
    assert torch.equal(split.bias, joint.bias)


def scenario_exchange(folder: Path) -> None:
    for world in (1, 2, 4):
        group = dist.new_group(list(range(world)), timeout=PATIENCE)
        if dist.get_rank() < world:
            check_equals_one_process(group)
            check_bit_for_bit(group)
            check_skipping_experts(group)
            check_refusals(group)
            check_balancer(group)


def make_gate() -> Gate:
    return Gate(LinearScorer(DIM, 7), TopK(2), balancer=BiasBalancer(7)).double()


def sharded_output(gate: Gate, experts: Sequence[nn.Module], group: Group) -> tuple[Tensor, Tensor]:
    """Logits of 12 tokens, and the outputs of this rank's share of them."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    with torch.no_grad():
        gated = gate.eval()(x)
        routing = route(gated.mask[share], gated.probs[share])
        return gated.logits, AllToAllExchange(group)(x[share], routing, experts)


def scenario_checkpoint(folder: Path) -> None:
    """Saved by 4 ranks, loaded by 2, 3 and 1: the same logits and outputs."""
    groups = {world: dist.new_group(list(range(world)), timeout=PATIENCE) for world in (4, 3, 2, 1)}
    rank = dist.get_rank()
    torch.manual_seed(11)  # the gate is shared by all ranks
    gate = make_gate()
    gate.observe(gate(torch.randn(9, DIM, dtype=torch.float64)))
    gate.advance()
    everything = [Outer().double() for _ in range(7)]
    experts = [everything[i] for i in expert_range(7, rank, 4)]
    save_experts(folder / "saved", experts, 7, shared=gate, group=groups[4])
    logits, out = sharded_output(gate, experts, groups[4])
    torch.save(out, folder / f"expected-{rank}.pt")
    dist.barrier()
    expected = torch.cat([torch.load(folder / f"expected-{r}.pt", weights_only=True) for r in range(4)])
    for world in (3, 2, 1):
        if rank < world:
            torch.manual_seed(100 + rank)  # whatever was there before is overwritten
            fresh = make_gate()
            fresh_experts: list[nn.Module] = [Outer().double() for _ in expert_range(7, rank, world)]
            load_experts(folder / "saved", fresh_experts, 7, shared=fresh, group=groups[world])
            assert fresh.step == 1 and fresh.balancer is not None and gate.balancer is not None
            assert torch.equal(fresh.balancer.ticks, gate.balancer.ticks)
            have_logits, have_out = sharded_output(fresh, fresh_experts, groups[world])
            share = slice(rank * 12 // world, (rank + 1) * 12 // world)
            # Bit for bit: an expert sees the rows of all ranks, in the same order whatever their number.
            assert torch.equal(have_logits, logits) and torch.equal(have_out, expected[share])
    check_failures_are_shared(folder, groups[4], gate, experts)


def check_failures_are_shared(folder: Path, group: Group, gate: Gate, experts: Sequence[nn.Module]) -> None:
    """What fails on one rank is an error on all, and nobody waits."""
    held = [*experts, experts[0]] if dist.get_rank(group) == 1 else experts
    for act in (save_experts, load_experts):
        path = folder / ("saved" if act is load_experts else "never")
        try:
            act(path, held, 7, shared=gate, group=group)
        except ValueError as error:
            assert "rank 1 of 4 holds experts range(2, 4), got 3 modules" in str(error)
        else:
            raise AssertionError("no rank noticed")
    assert not (folder / "never").exists()


SCENARIOS = {"exchange": scenario_exchange, "checkpoint": scenario_checkpoint}


def work(rank: int, scenario: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=PATIENCE,
    )
    SCENARIOS[scenario](Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked after one import of torch, before any of its threads: four times cheaper than four imports.
    torch.multiprocessing.start_processes(work, args=tuple(sys.argv[1:]), nprocs=WORLD, start_method="fork")
