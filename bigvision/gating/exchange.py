"""Expert parallelism: experts are split over the ranks, rows travel to them and back.

Both exchanges compute what one process with all tokens (rank after rank) and all experts would, whatever
the number of ranks, tokens or selected pairs; they differ in what travels. All-to-all sends each selected
row to its
expert: N rows out and N back. All-gather sends every token to every rank and sums the results back: better
where most tokens go to most ranks, or where all-to-all is slow.

Collectives must be entered by all ranks, in the backward pass as well. A rank without tokens or whose
experts got none still has autograd nodes for both of its exchanges (see ``collectives``), so nobody waits
for it; the loss must depend on the output on every rank, as ``out.sum() * 0`` does.

Legend: W ranks, T tokens of a rank, E experts of all ranks, N selected pairs of a rank, R rows a rank works
on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather_rows, all_to_all_rows, gather_integers, reduce_scatter_rows
from .experts import Expert, idle_parameters, link_gradients, run_experts
from .routing import Routing, combine, dispatch
from .rows import gather_rows, weighted_sum_rows

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_DIMS = 8


def expert_range(num_experts: int, rank: int, world: int) -> range:
    """The experts of a rank: contiguous blocks, the first ones larger by one where they must."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in a world of {world}")
    small, larger = divmod(num_experts, world)
    start = rank * small + min(rank, larger)
    return range(start, start + small + (rank < larger))


@dataclass(frozen=True)
class _Plan:
    """What every rank knows of the others before rows travel.

    Attributes:
        counts: int64 [W, E] on the CPU, pairs of each source rank for each expert.
        tokens: tokens of each rank.
        rank: this one.
        ranges: experts of each rank.
    """

    counts: Tensor
    tokens: list[int]
    rank: int
    ranges: list[range]

    @property
    def mine(self) -> range:
        return self.ranges[self.rank]

    @property
    def received(self) -> Tensor:
        """int64 [W, E of this rank], rows this rank works on by source and expert."""
        return self.counts[:, self.mine.start : self.mine.stop]

    @property
    def expert_counts(self) -> list[int]:
        """Rows of each of this rank's experts."""
        return self.received.sum(0).tolist()


def _describe(x: Tensor) -> list[int]:
    """Dtype and shape of one row as integers of a fixed length."""
    if x.dim() - 1 > _MAX_DIMS or x.dtype not in _DTYPES:
        raise ValueError(
            f"rows must have at most {_MAX_DIMS} dimensions and a floating dtype, "
            f"got {x.dtype} {list(x.shape)}"
        )
    shape = list(x.shape[1:])
    return [_DTYPES.index(x.dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]


def _read(description: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    return _DTYPES[description[0]], tuple(description[2 : 2 + description[1]])


def _make_plan(x: Tensor, routing: Routing, experts: Sequence[Expert], group: Any) -> _Plan:
    """Tell all ranks the counts, and check on all of them at once that they agree."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    refusal: ValueError | None = None
    described = [0] * (2 + _MAX_DIMS)
    try:
        if len(x) != routing.num_tokens:
            raise ValueError(f"the routing is of {routing.num_tokens} tokens, x has {list(x.shape)}")
        described = _describe(x)
    except ValueError as error:  # told to the others, who would wait for this rank's word
        refusal = error
    head = [int(refusal is not None), len(x), len(experts), routing.num_experts, *described]
    heads = gather_integers(torch.tensor(head, device=x.device), group).tolist()
    if refusal is not None:
        raise refusal
    refusing = [other for other, (refused, *_) in enumerate(heads) if refused]
    if refusing:
        raise ValueError(f"ranks {refusing} can't take part: their rows or their routing don't fit")
    heads = [other[1:] for other in heads]
    if any(other[2:] != heads[0][2:] for other in heads):
        told = [(other[2], *_read(other[3:])) for other in heads]
        raise ValueError(f"ranks differ in experts, dtype or row shape: {told}")
    num_experts = routing.num_experts
    ranges = [expert_range(num_experts, other, world) for other in range(world)]
    held = [other[1] for other in heads]
    if held != [len(r) for r in ranges]:
        raise ValueError(
            f"ranks hold {held} experts, {num_experts} over {world} ranks are {[*map(len, ranges)]}"
        )
    counts = gather_integers(routing.counts, group)
    return _Plan(counts, [other[0] for other in heads], rank, ranges)


def _expert_order(received: Tensor, device: torch.device) -> Tensor:
    """int64 [R]: the order (expert, source) of rows that lie in the order (source, expert)."""
    sources, experts = received.shape
    labels = torch.arange(experts).repeat(sources).repeat_interleave(received.flatten())
    return labels.argsort(stable=True).to(device)


def _run_and_agree(
    rows: Tensor,
    thread: Tensor,
    plan: _Plan,
    experts: Sequence[Expert],
    group: Any,
    out_shape: Sequence[int] | None,
) -> Tensor:
    """Run this rank's experts, then agree with the others on what a row of output is.

    A rank whose experts got nothing learns the shape from the others. A rank whose expert fails says so
    before it raises; without that word the others would wait for its rows.
    """
    counts = plan.expert_counts
    failure: Exception | None = None
    y, word = rows, [0] * (2 + _MAX_DIMS)
    try:
        if len(rows):
            y = run_experts(rows, counts, experts, out_shape)
            word = _describe(y)
    except Exception as error:
        failure = error
    status = 2 if failure is not None else int(len(rows) > 0)
    words = gather_integers(torch.tensor([status, *word], device=rows.device), group).tolist()
    if failure is not None:
        raise failure
    failed = [rank for rank, other in enumerate(words) if other[0] == 2]
    if failed:
        raise RuntimeError(f"experts failed on ranks {failed}")
    told = [_read(other[1:]) for other in words if other[0] == 1]
    if len(set(told)) > 1:
        raise ValueError(f"experts of the ranks differ in what they return: {sorted(set(told), key=str)}")
    if not len(rows):
        dtype, shape = (
            told[0] if told else (rows.dtype, tuple(rows.shape[1:] if out_shape is None else out_shape))
        )
        y = rows.new_zeros(0, *shape, dtype=dtype)
    return link_gradients(y, [thread, *idle_parameters(counts, experts)])


class AllToAllExchange:
    """Each selected row to the rank of its expert and back; see the module's text.

    Args:
        group: of ranks that split the experts (by :func:`expert_range`); all ranks if absent.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(
        self,
        x: Tensor,
        routing: Routing,
        experts: Sequence[Expert],
        *,
        out_shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply experts that live on several ranks.

        Args:
            x: [T, ...], this rank's tokens, none allowed; rows alike on all ranks.
            routing: of the T tokens over all E experts.
            experts: this rank's, in the order of their global ids.
            out_shape: shape of one output row; needed only where no expert of any rank might run.

        Returns:
            [T, ...]: bit for bit what one process returns, if an expert computes a row the same in any batch.

        Raises:
            ValueError: on every rank, where ranks differ in E, in the rows of x or in what experts return.
            RuntimeError: an expert failed on another rank.
        """
        plan = _make_plan(x, routing, experts, self.group)
        send = [int(plan.counts[plan.rank, r.start : r.stop].sum()) for r in plan.ranges]
        receive = plan.received.sum(1).tolist()
        rows, thread = all_to_all_rows(dispatch(x, routing), send, receive, self.group)
        order = _expert_order(plan.received, x.device)
        y = _run_and_agree(gather_rows(rows, order), thread, plan, experts, self.group, out_shape)
        back, _ = all_to_all_rows(gather_rows(y, order.argsort()), receive, send, self.group)
        return combine(back, routing)


class AllGatherExchange:
    """All tokens to all ranks, sums of weighted results back; see the module's text.

    Args:
        group: of ranks that split the experts (by :func:`expert_range`); all ranks if absent.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(
        self,
        x: Tensor,
        routing: Routing,
        experts: Sequence[Expert],
        *,
        out_shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply experts that live on several ranks; see :meth:`AllToAllExchange.__call__`.

        Sums run over ranks in their order, so results equal one process to rounding.
        """
        plan = _make_plan(x, routing, experts, self.group)
        pairs = plan.counts.sum(1).tolist()
        # One node for both, so that all ranks gather their gradients in one order.
        thread, everyone, weight = all_gather_rows((x, routing.weight), (plan.tokens, pairs), self.group)
        token = self._global_tokens(routing, plan, pairs)
        mine = self._my_pairs(plan, x.device)
        rows = gather_rows(everyone, token[mine])
        y = _run_and_agree(rows, thread, plan, experts, self.group, out_shape)
        partial = weighted_sum_rows(y, gather_rows(weight, mine), token[mine], len(everyone))
        return reduce_scatter_rows(partial, plan.tokens, self.group).to(y.dtype)

    def _global_tokens(self, routing: Routing, plan: _Plan, pairs: list[int]) -> Tensor:
        """int64 [N of all ranks]: the token of each pair, counted over all ranks."""
        first = sum(plan.tokens[: plan.rank])
        _, token = all_gather_rows((routing.token + first,), (pairs,), self.group)
        return token

    def _my_pairs(self, plan: _Plan, device: torch.device) -> Tensor:
        """int64 [R]: which of all ranks' pairs go to this rank's experts, by expert, then by source."""
        flat = plan.counts.flatten()
        first = (flat.cumsum(0) - flat).view_as(plan.counts)[:, plan.mine.start : plan.mine.stop]
        received = plan.received
        starts, sizes = first.t().flatten(), received.t().flatten()
        # Runs of consecutive pairs, laid end to end.
        shift = (starts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
        return (torch.arange(int(sizes.sum())) + shift).to(device)
