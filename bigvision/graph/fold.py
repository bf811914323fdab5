"""Folding: an eval-mode batch norm behind a convolution becomes part of the convolution's weights.

The graph itself computes the folded weights from the network's own, so it follows them as they are trained,
and gradients of the folded weights reach convolution and norm alike.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from bigvision.graph.arguments import arguments
from bigvision.graph.trace import TracedGraph, operator_name


def fold_batch_norm(traced: TracedGraph) -> TracedGraph:
    """A graph of the same tensors that computes the same, without the batch norms that a convolution can do.

    Folded weights are computed in float64 and rounded to the weights' own dtype.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    foldable = {
        norm: convolution for norm in traced.operators() if (convolution := _convolution_behind(norm))
    }
    folded = set(foldable.values())
    for node in traced.graph.nodes:
        if node in folded or node.op == "output":
            continue
        if node in foldable:
            copies[node] = _folded(graph, node, foldable[node], copies)
        elif node.target is operator.getitem and node.args[0] in foldable:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = tuple(copies[node] for node in traced.outputs)
    graph.output(outputs)
    tensors = {copies[node]: tensor for node, tensor in traced.tensors.items()}
    names = {copies[node]: name for node, name in traced.names.items()}
    return replace(
        traced, graph=graph, image=copies[traced.image], outputs=outputs, tensors=tensors, names=names
    )


def folded_weight(weight: Tensor, gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """weight * gamma / sqrt(variance + eps), [out, in, kernel, kernel]."""
    return (weight.double() * _gain(gamma, variance, eps).view(-1, 1, 1, 1)).to(weight.dtype)


def folded_bias(
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """(bias - mean) * gamma / sqrt(variance + eps) + beta, [out]."""
    shift = (0.0 if bias is None else bias.double()) - mean.double()
    wide = shift * _gain(gamma, variance, eps) + (0.0 if beta is None else beta.double())
    return wide.to(mean.dtype)


def _gain(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    return (1.0 if gamma is None else gamma.double()) * (variance.double() + eps).rsqrt()


def _convolution_behind(norm: fx.Node) -> fx.Node | None:
    if operator_name(norm) != "_native_batch_norm_legit_no_training":
        return None
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    alone = operator_name(source) == "conv2d" and len(source.users) == 1
    return source if alone else None


def _folded(graph: fx.Graph, norm: fx.Node, convolution: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    def copied(node: fx.Node | None) -> fx.Node | None:
        return None if node is None else copies[node]

    args, of_norm = arguments(convolution), arguments(norm)
    gamma, beta = copied(of_norm["weight"]), copied(of_norm["bias"])
    mean, variance, eps = copies[of_norm["running_mean"]], copies[of_norm["running_var"]], of_norm["eps"]
    given: dict[str, Any] = dict(args) | {"input": copies[args["input"]]}
    given["weight"] = graph.create_node(
        "call_function",
        folded_weight,
        (copies[args["weight"]], gamma, variance, eps),
        name=f"{convolution.name}_folded_weight",
    )
    given["bias"] = graph.create_node(
        "call_function",
        folded_bias,
        (copied(args["bias"]), gamma, beta, mean, variance, eps),
        name=f"{convolution.name}_folded_bias",
    )
    for name, like in (("weight", args["weight"]), ("bias", of_norm["running_mean"])):
        given[name].meta = dict(convolution.meta) | {"val": like.meta["val"]}
    result = graph.call_function(convolution.target, tuple(given.values()))  # type: ignore[arg-type]
    result.meta = dict(convolution.meta)
    return result
