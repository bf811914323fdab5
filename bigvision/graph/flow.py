"""How rows flow through every operator: which of its input rows a row of its result depends on.

A value either *streams* (it has an axis of rows that follows the image's) or is *held* whole (a weight, a
global statistic and what is computed from it). One rule a family of operators says which of the two its
result is, where its rows lie, and what they read. An operator without a rule is refused by name and path.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bigvision.graph.arguments import arguments
from bigvision.graph.layout import HELD, Flow, Layout, UnsupportedOperatorError, refusal
from bigvision.graph.rules import RULES
from bigvision.graph.rules.registry import ANY, Rule
from bigvision.graph.rules.row_by_row import pointwise
from bigvision.graph.trace import TracedGraph, ancestors, operator_name, result_shape, result_shapes


def flows(traced: TracedGraph) -> dict[fx.Node, Flow]:
    """The flow of the image and of every node that the network's output depends on, in execution order.

    Raises:
        UnsupportedOperatorError: an operator that mixes rows in a way no rule covers, such as attention over
            pixels.
        OutputError: several outputs may be meant.
    """
    if traced.refused:
        raise UnsupportedOperatorError(f"the network can't be repeated from its graph: {traced.refused[0]}")
    found: dict[fx.Node, Flow] = {}
    needed = {traced.image} | ancestors([traced.output])
    for node in traced.operators():
        if node in needed:
            _require_repeatable(node)
    for node in traced.graph.nodes:
        if node not in needed:
            continue
        found[node] = Flow(Layout()) if node is traced.image else _flow(node, found)
    return found


def streaming_inputs(node: fx.Node, known: dict[fx.Node, Flow]) -> list[fx.Node]:
    """The inputs that stream, each once."""
    return [source for source in node.all_input_nodes if known[source].layout is not None]


def _flow(node: fx.Node, known: dict[fx.Node, Flow]) -> Flow:
    if node.op != "call_function":
        return HELD
    if node.target is operator.getitem:
        return _taken(node, known)
    streamed = streaming_inputs(node, known)
    name = operator_name(node)
    if not streamed:
        return _grown(node, name)
    rule = _rule(node, name)
    if rule is None:
        raise refusal(node, "it has no rule for rows")
    source = _joined(node, [known[one] for one in streamed])
    if rule.flow is not pointwise:
        _require_first_argument(node, arguments(node), streamed)
    return _checked(node, streamed, known, rule(node, source))


def _rule(node: fx.Node, name: str) -> Rule | None:
    """Ours, or ATen's tag of elementwise operators and overloads (the greater of two)."""
    own, tagged = RULES.get(name), _tagged(node)
    return tagged if tagged is not None and (own is None or own.flow is not pointwise) else own


def _require_repeatable(node: fx.Node) -> None:
    """Operators are run more than once, on parts, by themselves."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise refusal(node, "it runs graphs of its own")
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        args = arguments(node)
        off = not args.get("train", args.get("training", True))
        if not off and 0 not in (args.get("p"), args.get("dropout_p")):
            raise refusal(node, "it draws random numbers, other ones in each pass")


def _joined(node: fx.Node, sources: list[Flow]) -> Flow:
    """What streams into an operator, as one: operands without columns leave them to the others."""
    rows = {_rows(flow) for flow in sources}
    if len(rows) > 1:
        raise refusal(node, f"its inputs keep their rows on different axes, {sorted(rows)}")
    cols = {flow.layout.cols for flow in sources if flow.layout is not None} - {None}
    return Flow(Layout(rows.pop(), cols.pop() if len(cols) == 1 else None))


# Of their results only the first has a row kernel.
_ONE_RESULT = frozenset({"max_pool2d_with_indices", "native_layer_norm", "native_group_norm"})
_ONE_RESULT |= {"native_dropout", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}


def _taken(node: fx.Node, known: dict[fx.Node, Flow]) -> Flow:
    """One of an operator's several results."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    flow = known[source]
    if index and flow.layout is not None and operator_name(source) in _ONE_RESULT:
        raise refusal(source, f"its result {index} is used as a value")
    return replace(flow, rows=None, cols=None, statistic=False, broadcasts=False)


def _require_first_argument(node: fx.Node, args: dict[str, Any], streamed: list[fx.Node]) -> None:
    """All but elementwise operators take rows of the image in their first argument only."""
    for name, value in list(args.items())[1:]:
        if any(source in streamed for source in pytree.tree_leaves(value)):
            raise refusal(node, f"its `{name}` is made of rows of the image")


def _checked(node: fx.Node, streamed: list[fx.Node], known: dict[fx.Node, Flow], flow: Flow) -> Flow:
    """The rule's flow, held against the numbers of rows that the graph's own shapes tell.

    A row that is spread over others (of a slice, by broadcasting) would have to be read again and again.
    """
    before = {result_shape(source)[_rows(known[source])] for source in streamed}
    if len(before) > 1:
        raise refusal(node, f"its inputs have {sorted(before)} rows")
    if before == {0}:
        raise refusal(node, "its input has no rows")
    if flow.layout is None:
        return flow
    (size,) = before
    expected = (size, size) if flow.rows is None else (flow.rows.size_in, flow.rows.size_out)
    several = isinstance(node.meta["val"], list)  # of a tuple's parts some have no rows
    for shape in result_shapes(node)[: None if several else 1]:
        if (size, shape[flow.layout.rows]) != expected:
            raise refusal(node, f"it makes {shape[flow.layout.rows]} rows of {size}")
    widths = {_columns(source, known[source]) for source in streamed}
    if flow.cols is None and widths != {_columns(node, flow)}:
        return replace(flow, local_columns=False)
    return flow


def _columns(node: fx.Node, flow: Flow) -> int | None:
    """How many columns it has."""
    assert flow.layout is not None
    return None if flow.layout.cols is None else result_shape(node)[flow.layout.cols]


def _rows(flow: Flow) -> int:
    assert flow.layout is not None
    return flow.layout.rows


def _tagged(node: fx.Node) -> Rule | None:
    """The rule of an operator that ATen itself tags as treating every element alike, with any argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    return Rule(pointwise, {argument.name: ANY for argument in target._schema.arguments})


def _grown(node: fx.Node, name: str) -> Flow:
    """A held value that is spread over the image (global pooling's way back) streams from then on."""
    spreads = name.startswith(("upsample_", "_upsample_")) or name == "expand"
    if not spreads or len(result_shape(node)) != 4:
        return HELD
    before, after = (1, 1, *result_shape(node.all_input_nodes[0]))[-2], result_shape(node)[-2]
    if after <= before:
        return HELD
    if name == "expand":
        return Flow(Layout())
    if name not in RULES:
        raise refusal(node, "it has no rule for rows")
    return RULES[name](node, Flow(Layout()))
