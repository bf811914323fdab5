"""Operators that write their rows straight to where they are read: a line buffer, or a part of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.graph.arguments import arguments
from bigvision.graph.trace import operator_name
from bigvision.streaming.kernels import Span, Values, repeats

Writer = Callable[[Values, Span, Tensor], Any]
"""Computes an operator's rows a..b into a place of their shape."""

aten = torch.ops.aten


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=out)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relu": _relu,
    "add": aten.add.out,
    "sub": aten.sub.out,
    "mul": aten.mul.out,
    "div": torch.div,  # with a rounding mode, too
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


def writer_for(node: fx.Node) -> Writer | None:
    """How the operator writes into a given place; None where it makes memory of its own."""
    name = operator_name(node)
    if name == "cat":
        return _concatenation(node)
    if (factors := repeats(node)) is not None:
        return _repetition(node, factors)
    # Binary writers take two tensors; with a scalar the overload is another one.
    scalar = name in ("add", "sub", "mul", "div") and not isinstance(node.args[1], fx.Node)
    return None if scalar or name not in ELEMENTWISE else _elementwise(node)


def _elementwise(node: fx.Node) -> Writer:
    operator = ELEMENTWISE[operator_name(node)]

    def write(values: Values, span: Span, place: Tensor) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values)
        operator(*args, **kwargs, out=place)

    return write


def _concatenation(node: fx.Node) -> Writer:
    """Every part that doesn't stand in its place already (`LinePlan.part_of`)."""
    args = arguments(node)
    dim = args["dim"]

    def write(values: Values, span: Span, place: Tensor) -> None:
        start = 0
        for part in map(values, args["tensors"]):
            to = place.narrow(dim, start, part.shape[dim])
            if to.data_ptr() != part.data_ptr():
                to.copy_(part)
            start += part.shape[dim]

    return write


def _repetition(node: fx.Node, factors: tuple[int, int]) -> Writer:
    """Nearest upsampling by whole factors: each of the output's phases is a copy of the rows."""
    source = arguments(node)["input"]

    def write(values: Values, span: Span, place: Tensor) -> None:
        x = values(source)
        for phase in range(factors[0]):
            first = span.a + (phase - span.a) % factors[0]
            if first < span.b:
                to = place[..., first - span.a :: factors[0], :]
                rows = x.narrow(-2, first // factors[0] - span.read[0], to.shape[-2])
                to.unflatten(-1, (-1, factors[1])).copy_(rows[..., None].expand(*rows.shape, factors[1]))

    return write
