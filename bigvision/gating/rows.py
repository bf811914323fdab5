"""Gathering rows and summing rows: each the other's adjoint, both deterministic on every device.

Legend: T rows of the table, N indexed rows.
"""

import torch
from torch import Tensor


def _layers(index: Tensor, num_rows: int) -> list[Tensor]:
    """Positions of ``index`` in groups without repeats: each row's first, each row's second, ..."""
    order = index.argsort(stable=True)
    per_row = torch.bincount(index, minlength=num_rows)
    rank = torch.empty_like(index)
    first = per_row.cumsum(0) - per_row
    rank[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    deepest = int(per_row.max()) if num_rows else 0
    return [(rank == depth).nonzero().squeeze(1) for depth in range(deepest)]


def _add_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum rows into a table [num_rows, ...] in the order of ``index``."""
    out = rows.new_zeros(num_rows, *rows.shape[1:])
    if rows.device.type == "cpu":
        return out.index_add_(0, index, rows)
    # On an accelerator index_add_ is atomic and its order changes from run to run; without repeats it is not.
    for layer in _layers(index, num_rows):
        out.index_add_(0, index[layer], rows[layer])
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
        wide = grad if grad.dtype == torch.float64 else grad.float()
        return sum_rows(wide, index, ctx.num_rows).to(grad.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        return _add_rows(rows, index, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table [T, ...] and index int64 [N] -> [N, ...]; its gradient is :func:`sum_rows`, in float32."""
    gathered: Tensor = _Gather.apply(table, index)
    return gathered


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """rows [N, ...] summed by index int64 [N], in its order, into [num_rows, ...]; its gradient gathers."""
    summed: Tensor = _Sum.apply(rows, index, num_rows)
    return summed
