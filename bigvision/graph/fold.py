"""Folding for inference: a batch norm behind a convolution becomes part of the convolution's weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from bigvision.graph.arguments import arguments
from bigvision.graph.trace import TracedGraph, operator_name


def fold_batch_norm(traced: TracedGraph) -> TracedGraph:
    """A graph that computes the same with every eval-mode batch norm folded into the convolution before it.

    The folded weights are new tensors, computed in float64 and stored in the weights' own dtype: training
    needs the graph as it was traced.
    """
    graph, tensors, names = fx.Graph(), dict[fx.Node, Tensor](), dict[fx.Node, str]()
    copies: dict[fx.Node, fx.Node] = {}
    foldable = {
        norm: convolution for norm in traced.operators() if (convolution := _convolution_behind(norm))
    }
    folded = set(foldable.values())
    for node in traced.graph.nodes:
        if node in folded or node.op == "output":
            continue
        if node in foldable:
            copies[node] = _folded(graph, node, foldable[node], traced, copies, tensors, names)
        elif node.target is operator.getitem and node.args[0] in foldable:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in traced.tensors:
                tensors[copies[node]], names[copies[node]] = traced.tensors[node], traced.names[node]
    outputs = tuple(copies[node] for node in traced.outputs)
    graph.output(outputs)
    return TracedGraph(graph, copies[traced.image], outputs, traced.rebuild, tensors, names, traced.shape)


def _convolution_behind(norm: fx.Node) -> fx.Node | None:
    if operator_name(norm) != "_native_batch_norm_legit_no_training":
        return None
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    alone = operator_name(source) == "conv2d" and len(source.users) == 1
    return source if alone else None


def _folded(
    graph: fx.Graph,
    norm: fx.Node,
    convolution: fx.Node,
    traced: TracedGraph,
    copies: dict[fx.Node, fx.Node],
    tensors: dict[fx.Node, Tensor],
    names: dict[fx.Node, str],
) -> fx.Node:
    args = arguments(convolution)
    weight, bias = _folded_weights(args, arguments(norm), traced.tensors)
    given: dict[str, Any] = dict(args) | {"input": copies[args["input"]]}
    with graph.inserting_before(next(iter(copies.values()))):  # placeholders stand first
        for name, tensor in (("weight", weight), ("bias", bias)):
            node = graph.placeholder(f"{convolution.name}_folded_{name}")
            node.meta["val"] = tensor.to("meta")
            tensors[node], names[node] = tensor, f"{convolution.name}.{name} with {norm.name}"
            given[name] = node
    result = graph.call_function(convolution.target, tuple(given.values()))  # type: ignore[arg-type]
    result.meta = dict(convolution.meta)
    return result


def _folded_weights(
    convolution: dict[str, Any], norm: dict[str, Any], tensors: dict[fx.Node, Tensor]
) -> tuple[Tensor, Tensor]:
    """(w*g, (b - mean)*g + beta) with g = gamma / sqrt(var + eps): the convolution that does both."""

    def of(node: fx.Node | None, default: float) -> Tensor:
        return torch.tensor(default, dtype=torch.float64) if node is None else tensors[node].detach().double()

    weight = tensors[convolution["weight"]].detach()
    gain = of(norm["weight"], 1.0) * (of(norm["running_var"], 1.0) + norm["eps"]).rsqrt()
    bias = (of(convolution["bias"], 0.0) - of(norm["running_mean"], 0.0)) * gain + of(norm["bias"], 0.0)
    return (weight.double() * gain.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)
