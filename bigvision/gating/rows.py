"""Gathering rows and summing rows: each the other's adjoint, both deterministic on every device.

Legend: T rows of the table, N indexed rows.
"""

import math

import torch
from torch import Tensor

_BLOCK = 1 << 17  # elements


def _layers(index: Tensor, num_rows: int) -> list[Tensor]:
    """Positions of ``index`` in groups without repeats: each row's first, each row's second, ..."""
    order = index.argsort(stable=True)
    per_row = torch.bincount(index, minlength=num_rows)
    rank = torch.empty_like(index)
    first = per_row.cumsum(0) - per_row
    rank[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    deepest = int(per_row.max()) if num_rows else 0
    return [(rank == depth).nonzero().squeeze(1) for depth in range(deepest)]


def _adds_in_order(device: torch.device) -> bool:
    """Whether index_add_ adds in the order of its index; elsewhere atomics add in any order."""
    return device.type == "cpu"


def _blocks(rows: Tensor) -> list[slice]:
    """Slices of rows whose products stay in the cache of a CPU; one slice on an accelerator."""
    height = len(rows)
    if rows.device.type == "cpu":
        height = max(1, _BLOCK // max(1, math.prod(rows.shape[1:])))
    return [slice(top, top + height) for top in range(0, len(rows), max(1, height))]


def add_rows_(table: Tensor, rows: Tensor, weight: Tensor | None, index: Tensor) -> None:
    """Add rows [N, ...] (times weight [N]) to a table [T, ...] by index int64 [N], in its order, untaped."""
    for block in _blocks(rows):
        part, where = rows[block].to(table.dtype), index[block]
        if weight is not None:
            part = part * weight[block].view(-1, *(1,) * (rows.dim() - 1))
        if _adds_in_order(rows.device):
            table.index_add_(0, where, part)
            continue
        for layer in _layers(where, len(table)):  # without repeats the order of a sum is that of the layers
            table.index_add_(0, where[layer], part[layer])


def _add_rows(rows: Tensor, weight: Tensor | None, index: Tensor, num_rows: int) -> Tensor:
    """Rows (times weight) summed into [num_rows, ...], in float32 or wider."""
    dtypes = {rows.dtype} if weight is None else {rows.dtype, weight.dtype}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    out = rows.new_zeros(num_rows, *rows.shape[1:], dtype=wide)
    add_rows_(out, rows, weight, index)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.num_rows = len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return sum_rows(grad, index, ctx.num_rows).to(grad.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.dtype = rows.dtype
        return _add_rows(rows, None, index, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index).to(ctx.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    """One pass over the rows in blocks: their weighted copy, as large as they are, never exists."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, index: Tensor, num_rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weight, index)
        return _add_rows(rows, weight, index, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[no-untyped-def]
        rows, weight, index = ctx.saved_tensors
        gathered = gather_rows(grad, index)
        for_rows = for_weight = None
        if ctx.needs_input_grad[0]:
            for_rows = (gathered * weight.view(-1, *(1,) * (rows.dim() - 1))).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = (gathered * rows).flatten(1).sum(1).to(weight.dtype)
        return for_rows, for_weight, None, None


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table [T, ...] and index int64 [N] -> [N, ...]; its gradient is :func:`sum_rows`, in float32."""
    gathered: Tensor = _Gather.apply(table, index)
    return gathered


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """rows [N, ...] summed by index int64 [N], in its order, into [num_rows, ...]; its gradient gathers.

    The sum is float32, or float64 for float64 rows.
    """
    summed: Tensor = _Sum.apply(rows, index, num_rows)
    return summed


def weighted_sum_rows(rows: Tensor, weight: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """:func:`sum_rows` of rows [N, ...] times weight [N]; float32, or float64 where either is."""
    summed: Tensor = _WeightedSum.apply(rows, weight, index, num_rows)
    return summed
