"""Operators that can write their rows straight into the line buffer of the next convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.graph.trace import operator_name, result_shape
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
# Elementwise writers: the place may be their own input.
_IN_PLACE = frozenset(WRITERS) - {"cat"}
# Their results are memory of their own, not a view of something that others read.
_OWNERS = _IN_PLACE | {"conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "cat", "linear"}


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


def overwritten_input(stage: Stage) -> fx.Node | None:
    """The input in whose memory an elementwise operator can leave its result, if nobody else needs it."""
    node = stage.node
    if operator_name(node) not in _IN_PLACE or direct_writer(node) is None:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in stage.inputs or operator_name(source) not in _OWNERS:
        return None
    return source if result_shape(source) == result_shape(node) else None
