"""Operators that can write their rows straight into the line buffer of the next convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.graph.trace import operator_name
from bigvision.streaming.kernels import Span, Values
from bigvision.streaming.program import Stage

aten = torch.ops.aten


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=out)


def _cat(tensors: list[Tensor], dim: int = 0, *, out: Tensor) -> Tensor:
    return torch.cat(tensors, dim, out=out)


WRITERS: dict[str, Callable[..., Tensor]] = {
    "relu": _relu,
    "cat": _cat,
    "add": aten.add.out,
    "sub": aten.sub.out,
    "mul": aten.mul.out,
    "div": aten.div.out,
    "sigmoid": aten.sigmoid.out,
    "silu": aten.silu.out,
    "gelu": aten.gelu.out,
    "tanh": aten.tanh.out,
    "hardtanh": aten.hardtanh.out,
    "hardswish": aten.hardswish.out,
    "hardsigmoid": aten.hardsigmoid.out,
    "leaky_relu": aten.leaky_relu.out,
    "elu": aten.elu.out,
}
IN_PLACE = frozenset(WRITERS) - {"cat"}
"""Elementwise writers: the place may be their own input."""


def write_into(stage: Stage, values: Values, span: Span, place: Tensor) -> Tensor:
    """Compute rows a..b of a stage into `place`, directly where the operator can."""
    writer = direct_writer(stage.node)
    if writer is None:
        return place.copy_(stage.kernel(values, span))
    args, kwargs = fx.map_arg((stage.node.args, stage.node.kwargs), values)
    return writer(*args, **kwargs, out=place)


def direct_writer(node: fx.Node) -> Callable[..., Any] | None:
    """The operator's form with an `out`, where it has one and its operands are tensors."""
    writer = WRITERS.get(operator_name(node))
    if writer is None or (len(node.args) > 1 and not _takes(node)):
        return None
    return writer


def _takes(node: fx.Node) -> bool:
    """Binary writers take two tensors; with a scalar the overload is another one."""
    if operator_name(node) not in ("add", "sub", "mul", "div"):
        return True
    return isinstance(node.args[1], fx.Node)
