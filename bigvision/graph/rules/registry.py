"""The rules by operator name, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from bigvision.graph.layout import Flow, Layout, refusal

Rule = Callable[[fx.Node, dict[str, Any], Flow], Flow]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


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
