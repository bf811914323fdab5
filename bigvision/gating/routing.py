"""A mask becomes (expert, token) pairs; rows travel to their experts and back.

Legend: T tokens, E experts, N selected pairs, ``...`` any trailing shape of a token (features, or a whole
    tile).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .rows import gather_rows, sum_rows, weighted_sum_rows

Priority = Literal["position", "score"]


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert and with what weight; pairs are sorted by expert, then by token.

    Attributes:
        token: int64 [N], the token of each pair.
        counts: int64 [E], pairs of each expert; their sum is N.
        weight: float32 [N], differentiable.
        num_tokens: T.
        dropped: int64 [E], pairs left out because the expert was full.
    """

    token: Tensor
    counts: Tensor
    weight: Tensor
    num_tokens: int
    dropped: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    @property
    def expert(self) -> Tensor:
        """int64 [N], the expert of each pair."""
        ids = torch.arange(self.num_experts, device=self.counts.device)
        return ids.repeat_interleave(self.counts, output_size=len(self.token))


def route(
    mask: Tensor,
    probs: Tensor,
    *,
    renormalize: bool = False,
    capacity: int | Tensor | None = None,
    priority: Priority = "position",
) -> Routing:
    """Turn a mask into the pairs that experts work on.

    Args:
        mask: bool [T, E], the selected pairs.
        probs: float [T, E], combine weights; selection scores (with noise, bias, ...) have no place here.
        renormalize: make the weights of a token's kept pairs sum to 1 (a token whose kept weights are all 0
            keeps zeros). With one pair a token the weight is 1 and the router gets no gradient.
        capacity: most pairs of an expert, at least 0: one number, or int64 [E]. Absent: no bound.
        priority: who stays where an expert is full: the first tokens ("position"), or those of highest weight
            before renormalising ("score", ties to the first).

    Returns:
        A :class:`Routing`.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, negative capacity, unknown priority.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != probs.shape:
        raise ValueError(
            "mask must be bool [T, E] and probs of its shape, "
            f"got {mask.dtype} {list(mask.shape)} and {list(probs.shape)}"
        )
    if priority not in get_args(Priority):
        raise ValueError(f"priority must be one of {get_args(Priority)}, got {priority!r}")
    num_tokens, num_experts = mask.shape
    expert, token = mask.t().nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=num_experts)
    # Looked up in the matrix: only selected entries are touched, and only they get a gradient.
    weight = probs[token, expert]
    weight = weight if weight.dtype == torch.float64 else weight.float()
    dropped = torch.zeros_like(counts)
    if capacity is not None:
        kept = _within_capacity(expert, counts, weight.detach(), capacity, priority)
        expert, token, weight = expert[kept], token[kept], weight[kept]
        dropped = counts - (counts := torch.bincount(expert, minlength=num_experts))
    if renormalize:
        total = sum_rows(weight, token, num_tokens)
        total = torch.where(total == 0, torch.ones_like(total), total)
        weight = weight / gather_rows(total, token)
    return Routing(token, counts, weight, num_tokens, dropped)


def _within_capacity(
    expert: Tensor, counts: Tensor, weight: Tensor, capacity: int | Tensor, priority: Priority
) -> Tensor:
    """Bool [N]: the pairs an expert has room for, by rank among its own pairs."""
    room = torch.as_tensor(capacity, device=counts.device).expand(len(counts))
    if bool((room < 0).any()):
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    rank = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert]
    if priority == "position":
        return rank < room[expert]
    # Two stable sorts, the last key first: by weight, then by expert; equal weights keep the order of tokens.
    by_weight = weight.argsort(descending=True, stable=True)
    order = by_weight[expert[by_weight].argsort(stable=True)]
    kept = torch.empty(len(expert), dtype=torch.bool, device=expert.device)
    kept[order] = rank < room[expert]  # sorted by expert, the i-th pair has the i-th rank
    return kept


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Gather the rows experts work on: x [T, ...] -> [N, ...], expert after expert (split by ``counts``).

    Raises:
        ValueError: x has another number of tokens than the routing.
    """
    if len(x) != routing.num_tokens:
        raise ValueError(f"the routing is of {routing.num_tokens} tokens, x has {list(x.shape)}")
    return gather_rows(x, routing.token)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Sum each token's rows by weight: y [N, ...] -> [T, ...]; a token without pairs gets zeros.

    Accumulates in float32 (float64 for float64) in a fixed order on every device, and returns the dtype of
    ``y``.

    Raises:
        ValueError: y has another number of rows than the routing has pairs.
    """
    if len(y) != len(routing.token):
        raise ValueError(f"the routing has {len(routing.token)} pairs, y has {list(y.shape)}")
    return weighted_sum_rows(y, routing.weight, routing.token, routing.num_tokens).to(y.dtype)
