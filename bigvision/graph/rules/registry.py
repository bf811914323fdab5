"""The rules by operator name, what each honours of its operator's arguments, and what rules share.

A rule is registered with a statement for every operator: the names of the arguments of its ATen schema that
the rule, and the kernel or statistic behind it, takes into account (``mean="self dim keepdim dtype"``), or
the one value at which it does (``rrelu="self training=False"``). Any other argument that is not at its
schema's default is refused by name, so that none is overlooked.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bigvision.graph.arguments import arguments, same_value
from bigvision.graph.layout import Flow, Layout, refusal
from bigvision.graph.trace import result_shape

FlowOf = Callable[[fx.Node, dict[str, Any], Flow], Flow]
"""The flow of a node, given its arguments and the flow of its (first) streaming input."""

ANY = object()
"""An argument that is honoured whatever its value."""


@dataclass(frozen=True)
class Rule:
    """How rows flow through one operator.

    Attributes:
        flow: of a node whose arguments are honoured.
        honours: by argument the value that is honoured, or `ANY`.
    """

    flow: FlowOf
    honours: Mapping[str, Any]

    def __call__(self, node: fx.Node, source: Flow) -> Flow:
        """The flow of `node`, whose inputs stream as `source`.

        Raises:
            UnsupportedOperatorError: an argument that the rule doesn't honour is not at its default; or what
                the rule itself refuses.
        """
        args = arguments(node)
        defaults = {one.name: one for one in node.target._schema.arguments}  # type: ignore[union-attr]
        for name, value in args.items():
            honoured = self.honours.get(name, defaults[name].default_value)
            required = name not in self.honours and not defaults[name].has_default_value()
            if required or (honoured is not ANY and not same_value(value, honoured)):
                raise refusal(node, f"its rule does not honour the argument {name}={_shown(value)}")
        return self.flow(node, args, source)


RULES: dict[str, Rule] = {}


def rule(**statements: str) -> Callable[[FlowOf], FlowOf]:
    """Register a rule for operators, each with the arguments that it honours.

    Raises:
        TypeError: ATen has no such operator or no such argument, or an operator has a rule already.
    """

    def register(function: FlowOf) -> FlowOf:
        for name, statement in statements.items():
            if name in RULES:
                raise TypeError(f"{name} has a rule already")
            RULES[name] = Rule(function, _stated(name, statement))
        return function

    if not statements:
        raise TypeError("a rule is registered for operators, each with the arguments that it honours")
    return register


def _stated(name: str, statement: str) -> dict[str, Any]:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        raise TypeError(f"ATen has no operator {name}")
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    known = {argument.name for schema in schemas for argument in schema.arguments}
    honours: dict[str, Any] = {}
    for part in statement.split():
        argument, _, value = part.partition("=")
        if argument not in known:
            raise TypeError(f"{name} has no argument {argument}: {', '.join(sorted(known))}")
        honours[argument] = ast.literal_eval(value) if value else ANY
    return honours


def _shown(value: Any) -> str:
    return f"a tensor of {result_shape(value)}" if isinstance(value, fx.Node) else repr(value)


def layout_of(flow: Flow) -> Layout:
    """The layout of a value known to stream."""
    assert flow.layout is not None
    return flow.layout


def moved_layout(rows: int | None, cols: int | None) -> Layout:
    """A layout whose rows are known to have survived."""
    assert rows is not None
    return Layout(rows, cols)


def pushed(position: int | None, axis: int) -> int | None:
    """A negative axis after a new one was inserted at the negative `axis` of the result."""
    return None if position is None else position if axis < position else position - 1


def pulled(position: int | None, axis: int) -> int | None:
    """A negative axis after the negative `axis` was taken out."""
    return None if position is None else position if axis < position else position + 1


def negative(dim: int, shape: tuple[int, ...]) -> int:
    """An axis counted from the end."""
    return dim if dim < 0 else dim - len(shape)


def nchw(node: fx.Node, source: Flow) -> Layout:
    """The layout [1, C, H, W], which the operator expects."""
    if source.layout != Layout():
        raise refusal(node, "it expects rows and columns to be the last two axes")
    return Layout()
