"""Collectives over rows of uneven numbers, differentiable, with a node on every rank.

A backward pass is a collective too, and a rank that left it out would hang the others. So each function has
an input that always requires a gradient (the anchor), and those whose rows go to experts return a scalar (the
thread) to be tied to what the experts return: a rank without rows, or with an expert that ignores its input,
takes part.

Legend: W ranks, T rows of a rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _anchor() -> Tensor:
    return torch.zeros((), requires_grad=torch.is_grad_enabled())


def gather_integers(values: Tensor, group: Any) -> Tensor:
    """int64 [n] of each rank -> int64 [W, n] on the CPU."""
    world = dist.get_world_size(group)
    out = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(out, values.contiguous(), group=group)
    return torch.stack(out).cpu()


def _width(rows: Tensor) -> int:
    """Elements of a row."""
    return math.prod(rows.shape[1:])


def _bytes(rows: Tensor) -> Tensor:
    """Rows [T, ...] as uint8 [T, bytes of a row]: backends that know no bf16 still move it."""
    return rows.contiguous().view(len(rows), _width(rows)).view(torch.uint8)


def _all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    if _width(rows) == 0:
        return out  # every rank sees that nothing travels
    dist.all_to_all_single(_bytes(out), _bytes(rows), list(receive), list(send), group=group)
    return out


def _all_gather(rows: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """[T, ...] of each rank -> [sum of sizes, ...]; they travel padded to the largest rank's."""
    largest = max(sizes)
    if largest == 0 or _width(rows) == 0:
        return rows.new_empty(sum(sizes), *rows.shape[1:])
    padded = rows.new_zeros(largest, *rows.shape[1:])
    padded[: len(rows)] = rows
    out = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather([_bytes(o) for o in out], _bytes(padded), group=group)
    return torch.cat([block[:size] for block, size in zip(out, sizes, strict=True)])


def _reduce_scatter(rows: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """[sum of sizes, ...] of each rank -> this rank's [T, ...] of their sum, added in the order of ranks."""
    own = sizes[dist.get_rank(group)]
    parts = _all_to_all(rows, sizes, [own] * len(sizes), group)
    wide = parts.dtype if parts.dtype == torch.float64 else torch.float32
    total = torch.zeros(own, *rows.shape[1:], dtype=wide, device=rows.device)
    for rank in range(len(sizes)):
        total += parts[rank * own : (rank + 1) * own]
    return total.to(rows.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group), anchor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, thread: Tensor) -> tuple[Tensor | None, ...]:
        return thread, _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, sizes: Sequence[Sequence[int]], group: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.group = sizes, group
        out = tuple(_all_gather(t, s, group) for t, s in zip(tensors, sizes, strict=True))
        ctx.mark_non_differentiable(*(o for o in out if not o.is_floating_point()))
        return anchor.clone(), *out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, thread: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = [
            _reduce_scatter(g, s, ctx.group) if g.is_floating_point() else None
            for g, s in zip(grads, ctx.sizes, strict=True)
        ]
        return thread, None, None, *back


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _reduce_scatter(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros(()), _all_gather(grad, ctx.sizes, ctx.group), None, None


def all_to_all_rows(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Any = None
) -> tuple[Tensor, Tensor]:
    """Rows to their ranks: the first send[0] to rank 0, and so on; received in the order of ranks.

    Args:
        rows: [sum of send, ...].
        send: rows for each rank.
        receive: rows from each rank.
        group: of the ranks; all if absent.

    Returns:
        [sum of receive, ...], whose gradient travels back the same way, and the thread.
    """
    out: tuple[Tensor, Tensor] = _AllToAll.apply(_anchor(), rows, send, receive, group)
    return out


def all_gather_rows(
    tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]], group: Any = None
) -> tuple[Tensor, ...]:
    """The thread, then each tensor [T, ...] of all ranks, concatenated; gradients are summed over the ranks.

    Args:
        tensors: any number; one node of the graph for all, so their gradients travel in a fixed order.
        sizes: for each tensor, its rows on each rank.
        group: of the ranks; all if absent.
    """
    out: tuple[Tensor, ...] = _AllGather.apply(_anchor(), sizes, group, *tensors)
    return out


def reduce_scatter_rows(rows: Tensor, sizes: Sequence[int], group: Any = None) -> Tensor:
    """Sum [sum of sizes, ...] over the ranks and keep this rank's rows; the gradient is gathered."""
    out: Tensor = _ReduceScatter.apply(_anchor(), rows, sizes, group)
    return out
