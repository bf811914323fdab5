"""The tile functions as they are, or compiled."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heads import counter, kernels


@dataclass(frozen=True)
class Kernels:
    """The functions around the GEMMs; `compiled` says whether torch.compile has fused their passes."""

    sum_exp: Callable[..., Any] = kernels.sum_exp
    max_sum_exp: Callable[..., Any] = kernels.max_sum_exp
    softmax_gradient_: Callable[..., Any] = kernels.softmax_gradient_
    update_tile_: Callable[..., Any] = kernels.update_tile_
    inverse_norms: Callable[..., Any] = kernels.inverse_norms
    normal_rows: Callable[..., Any] = counter.normal_rows
    compiled: bool = False


def choose_kernels(compiled: bool, device: torch.device) -> Kernels:
    """Eager kernels, or compiled ones; where there is no working compiler it says so and returns eager ones.

    The results are the same to rounding. Compiled kernels read and write each tile once instead of once an
    operation, and take some seconds to build at the first step.
    """
    if not compiled:
        return Kernels()
    try:
        probe = torch.compile(kernels.inverse_norms, dynamic=True)
        probe(torch.ones(3, 5, device=device), torch.float32)
    except Exception as error:  # whatever the compiler's many layers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"torch.compile doesn't work here ({reason}): the head runs eagerly, several times slower",
            stacklevel=2,
        )
        return Kernels()
    fused = {
        name: torch.compile(getattr(Kernels, name), dynamic=True)
        for name in Kernels.__dataclass_fields__
        if name not in ("compiled", "normal_rows")
    }
    return Kernels(**fused, normal_rows=_fused_normal_rows(), compiled=True)


def _fused_normal_rows() -> Callable[..., Any]:
    """The keys of the rows are few: only what is done to every element is compiled."""
    spread = torch.compile(counter.spread_normal, dynamic=True)

    def normal_rows(seed: int, ids: Tensor, dim: int, std: float, dtype: torch.dtype) -> Tensor:
        first, second = counter.row_keys(seed, counter.STREAM_INIT, 0, ids)
        rows: Tensor = spread(first, second, dim, std, dtype)
        return rows

    return normal_rows
