"""How rows flow through every operator: which of its input rows a row of its result depends on.

A value either *streams* (it has an axis of rows that follows the image's) or is *held* whole (a weight, a
global statistic and what is computed from it). One rule a family of operators says which of the two its
result is, where its rows lie, and what they read. An operator without a rule is refused by name and path.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from bigvision.graph.arguments import arguments
from bigvision.graph.layout import HELD, Flow, Layout, refusal
from bigvision.graph.rules import RULES
from bigvision.graph.rules.row_by_row import pointwise
from bigvision.graph.trace import TracedGraph, operator_name, result_shape


def flows(traced: TracedGraph) -> dict[fx.Node, Flow]:
    """The flow of the image and of every node that the network's output depends on, in execution order.

    Raises:
        UnsupportedOperatorError: an operator that mixes rows in a way no rule covers, such as attention over
            pixels.
        OutputError: several outputs may be meant.
    """
    found: dict[fx.Node, Flow] = {}
    needed = {traced.image} | _ancestors(traced.output)
    for node in traced.graph.nodes:
        if node not in needed:
            continue
        found[node] = Flow(Layout()) if node is traced.image else _flow(node, found)
    return found


def streaming_inputs(node: fx.Node, known: dict[fx.Node, Flow]) -> list[fx.Node]:
    """The inputs that stream, each once."""
    return [source for source in node.all_input_nodes if known[source].layout is not None]


def _ancestors(output: fx.Node) -> set[fx.Node]:
    found, waiting = {output}, [output]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _flow(node: fx.Node, known: dict[fx.Node, Flow]) -> Flow:
    if node.op != "call_function":
        return HELD
    if node.target is operator.getitem:
        return replace(known[node.args[0]], rows=None, cols=None, statistic=False)  # type: ignore[index]
    streamed = streaming_inputs(node, known)
    name = operator_name(node)
    if not streamed:
        return _grown(node, name)
    rule = RULES.get(name) or (pointwise if _is_pointwise(node) else None)
    if rule is None:
        raise refusal(node, "it has no rule for rows")
    layouts = {known[source].layout for source in streamed}
    if len(layouts) > 1:
        raise refusal(node, f"its inputs keep their rows on different axes: {sorted(map(str, layouts))}")
    return rule(node, arguments(node), known[streamed[0]])


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _grown(node: fx.Node, name: str) -> Flow:
    """A held value that is spread over the image (global pooling's way back) streams from then on."""
    spreads = name.startswith(("upsample_", "_upsample_")) or name == "expand"
    if not spreads or len(result_shape(node)) != 4:
        return HELD
    before, after = result_shape(node.all_input_nodes[0])[-2], result_shape(node)[-2]
    if after <= before:
        return HELD
    if name == "expand":
        return Flow(Layout())
    return RULES[name](node, arguments(node), Flow(Layout()))
