"""Held values, weights first: kept in their own precision, narrowed where rows of another meet them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bigvision.streaming.program import Program

Held = dict[fx.Node, Any]


def weights_of(program: Program, device: torch.device) -> Held:
    """The program's weights in their own precision: what is computed of them and of statistics is so too."""
    return {node: tensor.detach().to(device) for node, tensor in program.traced.tensors.items()}


def narrowed(held: Held, dtype: torch.dtype) -> Held:
    """Held values in the precision and layout that rows are computed in; pairs (moments) stay as they are."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(dtype=dtype, memory_format=layout)

    return {node: one(value) for node, value in held.items()}
