"""Experts on the rows that were routed to them (hard), or all on all rows under the same mask (soft).

Legend: T tokens, E experts, N selected pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .routing import Routing, combine, dispatch
from .rows import add_rows_, gather_rows

Expert = Callable[[Tensor], Tensor]
Mode = Literal["hard", "soft"]


class _Link(torch.autograd.Function):
    """y unchanged, with zero gradients for tensors that had no part in it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.others)


def link_gradients(y: Tensor, others: Iterable[Tensor]) -> Tensor:
    """y, in whose backward pass every one of ``others`` gets a gradient of zeros instead of none."""
    wanted = [other for other in others if other.requires_grad]
    linked: Tensor = _Link.apply(y, *wanted) if wanted and torch.is_grad_enabled() else y
    return linked


def idle_parameters(counts: Sequence[int], experts: Sequence[Expert]) -> list[Tensor]:
    """Parameters of the experts without a row."""
    idle = (expert for count, expert in zip(counts, experts, strict=True) if not count)
    return [p for expert in idle if isinstance(expert, nn.Module) for p in expert.parameters()]


def run_experts(
    rows: Tensor, counts: Sequence[int], experts: Sequence[Expert], out_shape: Sequence[int] | None = None
) -> Tensor:
    """Run each expert on its own block of rows; an expert with none is not called.

    Args:
        rows: [N, ...], expert after expert.
        counts: rows of each expert; they sum to N.
        experts: E callables from [n, ...] to [n, ...].
        out_shape: shape of one output row. Needed only where no expert runs and outputs differ from inputs.

    Returns:
        [N, ...].

    Raises:
        ValueError: counts that do not fit, or outputs that differ in shape or dtype.
    """
    if len(counts) != len(experts) or sum(counts) != len(rows):
        raise ValueError(
            f"{len(experts)} experts and {len(rows)} rows do not fit "
            f"{len(counts)} counts of {sum(counts)} rows"
        )
    outputs: list[Tensor] = []
    # torch.split of uneven sizes is one node of the graph, slices are one each.
    for expert_id, (block, expert) in enumerate(zip(rows.split(list(counts)), experts, strict=True)):
        if len(block):
            outputs.append(_run_one(expert_id, expert, block, outputs[0] if outputs else None, out_shape))
    if not outputs:
        return rows.new_zeros(0, *(rows.shape[1:] if out_shape is None else out_shape))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _run_one(
    expert_id: int, expert: Expert, rows: Tensor, earlier: Tensor | None, out_shape: Sequence[int] | None
) -> Tensor:
    """Run an expert and check that what it returns is as wide as what an earlier one did."""
    output = expert(rows)
    if earlier is not None and output.shape[1:] != earlier.shape[1:]:
        raise ValueError(
            f"experts differ in what they return: expert {expert_id} rows of {list(output.shape[1:])}, "
            f"an earlier one {list(earlier.shape[1:])}"
        )
    dtype = output.dtype if earlier is None else earlier.dtype
    shape = [len(rows), *(output.shape[1:] if out_shape is None else out_shape)]
    if list(output.shape) != shape or output.dtype != dtype:
        raise ValueError(
            f"expert {expert_id} turned {list(rows.shape)} into {output.dtype} {list(output.shape)}, "
            f"expected {dtype} {shape}"
        )
    return output


def _apply_in_turn(
    x: Tensor, routing: Routing, experts: Sequence[Expert], counts: list[int], out_shape: Sequence[int] | None
) -> Tensor:
    """Hard mode without a tape: gather, run and add one expert after the other.

    The same sums in the same order as with all rows at once, but those never exist together: less memory, and
    small blocks come from the allocator's free lists where a large one faults in page by page.
    """
    total: Tensor | None = None
    first: Tensor | None = None
    for expert_id, (token, weight, expert) in enumerate(
        zip(routing.token.split(counts), routing.weight.split(counts), experts, strict=True)
    ):
        if not len(token):
            continue
        y = _run_one(expert_id, expert, gather_rows(x, token), first, out_shape)
        if total is None:
            first = y.new_empty(0, *y.shape[1:])  # what later outputs are compared with
            wide = torch.float64 if torch.float64 in (y.dtype, weight.dtype) else torch.float32
            total = x.new_zeros(len(x), *y.shape[1:], dtype=wide)
        add_rows_(total, y, weight, token)
    if total is None or first is None:
        return x.new_zeros(len(x), *(x.shape[1:] if out_shape is None else out_shape))
    return total.to(first.dtype)


def apply_experts(
    x: Tensor,
    routing: Routing,
    experts: Sequence[Expert],
    *,
    out_shape: Sequence[int] | None = None,
    zero_idle: bool = False,
) -> Tensor:
    """Hard mode: every expert sees its own rows only, and the results are summed by weight.

    Route outside of activation checkpointing and hand the routing in: scores that are computed again may
    select other pairs than the forward pass did.

    Args:
        x: [T, ...].
        routing: of T tokens over E experts.
        experts: E callables from [n, ...] to [n, ...], agreeing in what they return.
        out_shape: shape of one output row, see :func:`run_experts`.
        zero_idle: give the parameters of experts without rows gradients of zeros instead of none, as sharded
            optimisers and gradient all-reduces need.

    Returns:
        [T, ...]; zeros for tokens without an expert.
    """
    _check_experts(routing, experts)
    counts = routing.counts.tolist()
    if not torch.is_grad_enabled():
        return _apply_in_turn(x, routing, experts, counts, out_shape)
    y = run_experts(dispatch(x, routing), counts, experts, out_shape)
    if zero_idle:
        y = link_gradients(y, idle_parameters(counts, experts))
    return combine(y, routing)


def apply_experts_soft(x: Tensor, routing: Routing, experts: Sequence[Expert]) -> Tensor:
    """Soft mode: every expert sees every token, multiplied by mask x weight.

    The numbers of :func:`apply_experts` at full cost: its reference, and a way to train a gate early.

    Args:
        x: [T, ...].
        routing: of T tokens over E experts.
        experts: E callables from [T, ...] to [T, ...].

    Returns:
        [T, ...].
    """
    _check_experts(routing, experts)
    weight = dense_weights(routing)
    total: Tensor | None = None
    dtype = x.dtype
    for expert_id, expert in enumerate(experts):
        y = expert(x)
        dtype = y.dtype
        wide = y if y.dtype == torch.float64 else y.float()
        part = wide * weight[:, expert_id].view(-1, *(1,) * (y.dim() - 1))
        if total is not None and total.shape != part.shape:
            raise ValueError(
                f"experts differ in what they return: expert {expert_id} {list(part.shape)}, "
                f"earlier ones {list(total.shape)}"
            )
        total = part if total is None else total + part
    return torch.zeros_like(x) if total is None else total.to(dtype)


def dense_weights(routing: Routing) -> Tensor:
    """mask x weight as a matrix: float32 [T, E], 0 where not selected, differentiable."""
    flat = routing.token * routing.num_experts + routing.expert
    dense = routing.weight.new_zeros(routing.num_tokens * routing.num_experts)
    return dense.index_put((flat,), routing.weight).view(routing.num_tokens, routing.num_experts)


def _check_experts(routing: Routing, experts: Sequence[Expert]) -> None:
    if len(experts) != routing.num_experts:
        raise ValueError(f"the routing is over {routing.num_experts} experts, got {len(experts)}")


class Experts(nn.Module):
    """A list of experts and the mode they run in.

    Args:
        experts: E modules from [n, ...] to [n, ...].
        mode: "hard" or "soft": the same numbers, see the functions.
        zero_idle: see :func:`apply_experts`.
    """

    def __init__(self, experts: Iterable[nn.Module], *, mode: Mode = "hard", zero_idle: bool = False) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        self.experts = nn.ModuleList(experts)
        self.mode, self.zero_idle = mode, zero_idle

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, ...] of x [T, ...]."""
        experts = list(self.experts)
        if self.mode == "soft":
            return apply_experts_soft(x, routing, experts)
        return apply_experts(x, routing, experts, zero_idle=self.zero_idle)
