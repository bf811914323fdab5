"""The tile functions as they are, or compiled ahead of time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heads import counter, kernels
from heads.ahead import AheadKernel, Library


@dataclass(frozen=True)
class Kernels:
    """The functions around the GEMMs."""

    sum_exp: Callable[..., Any] = kernels.sum_exp
    max_sum_exp: Callable[..., Any] = kernels.max_sum_exp
    softmax_gradient_: Callable[..., Any] = kernels.softmax_gradient_
    update_tile_: Callable[..., Any] = kernels.update_tile_
    inverse_norms: Callable[..., Any] = kernels.inverse_norms
    spread_normal: Callable[..., Any] = counter.spread_normal

    def normal_rows(self, seed: int, ids: Tensor, dim: int, std: float, dtype: torch.dtype) -> Tensor:
        """See `counter.normal_rows`. The rows' keys are few: what is done to every element counts."""
        first, second = counter.row_keys(seed, counter.STREAM_INIT, 0, ids)
        rows: Tensor = self.spread_normal(first, second, dim, std, dtype)
        return rows


def choose_kernels(compiled: bool) -> Kernels:
    """Eager kernels, or compiled ones. The results are the same to rounding.

    Compiled kernels read and write each tile once instead of once an operation. The first head of its kind
    builds them, for some ten seconds each; they are kept in the user's cache folder.
    """
    if not compiled:
        return Kernels()
    library = Library()
    return Kernels(
        AheadKernel(library, kernels.sum_exp, "KB", "K", "K"),
        AheadKernel(library, kernels.max_sum_exp, "KB", "K", "K"),
        AheadKernel(library, kernels.softmax_gradient_, "KB", "K", "K", "B", "B"),
        AheadKernel(library, kernels.update_tile_, "KD", "K", "KD", "K", "", "", "K"),
        AheadKernel(library, kernels.inverse_norms, "KD"),
        AheadKernel(library, counter.spread_normal, "K", "K"),
    )
