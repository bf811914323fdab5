"""The traced graph as a cost model: parameters, FLOPs and bytes, by operator and in all.

Legend: C channels, H rows, W columns of the image; a FLOP is one multiplication or one addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from bigvision.graph.arguments import arguments
from bigvision.graph.trace import TracedGraph, module_path, operator_name, result_shape


@dataclass(frozen=True)
class OperatorCost:
    """One operator: where it stands, its FLOPs and the bytes of its result."""

    operator: str
    module: str
    shape: tuple[int, ...]
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """A network at one image size.

    Attributes:
        parameters: count of distinct parameters; `parameter_bytes` what they take.
        flops: of one forward pass.
        dense_bytes: all results together, what plain autograd keeps for a backward pass (about).
        dense_peak_bytes: the most that is alive at once when the image is run whole without gradients.
        operators: each operator's share, in execution order.
    """

    parameters: int
    parameter_bytes: int
    flops: int
    dense_bytes: int
    dense_peak_bytes: int
    operators: tuple[OperatorCost, ...]


# They return (a part of) their input's own memory.
_VIEWS = frozenset(
    (
        *(
            "getitem",
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "permute",
            "transpose",
            "t",
            "unsqueeze",
            "squeeze",
        ),
        *("expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach"),
    )
)
# They move elements and compute nothing.
_COPIES = frozenset(("clone", "contiguous", "cat", "stack"))


def cost(traced: TracedGraph) -> Cost:
    """Count one forward pass of the traced network at its own image size."""
    operators = tuple(_operator_cost(node) for node in traced.operators())
    distinct = {id(tensor): tensor for _, tensor in traced.parameters()}.values()
    return Cost(
        parameters=sum(tensor.numel() for tensor in distinct),
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in distinct),
        flops=sum(one.flops for one in operators),
        dense_bytes=result_bytes(traced.image) + sum(one.bytes for one in operators),
        dense_peak_bytes=_peak(traced),
        operators=operators,
    )


def flops(node: fx.Node) -> int:
    """FLOPs of one operator: two a multiply-accumulate, one an element otherwise, none for a view."""
    name = operator_name(node)
    if name in _VIEWS or name in _COPIES:
        return 0
    size = math.prod(result_shape(node))
    if name == "conv2d":
        weight = result_shape(arguments(node)["weight"])
        return 2 * size * math.prod(weight[1:])
    if name == "conv_transpose2d":
        args = arguments(node)
        return 2 * math.prod(result_shape(args["input"])) * math.prod(result_shape(args["weight"])[1:])
    if name in ("linear", "matmul", "bmm"):
        args = arguments(node)
        return 2 * size * result_shape(args.get("input") or args["self"])[-1]
    if name in ("max_pool2d", "avg_pool2d"):
        kernel = arguments(node)["kernel_size"]
        return size * math.prod(list(kernel) * (2 if len(kernel) == 1 else 1))
    return size


def result_bytes(node: fx.Node) -> int:
    """Bytes of a node's own result; 0 for a view."""
    if _is_view(node):
        return 0
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    return first.numel() * first.element_size()


def _is_view(node: fx.Node) -> bool:
    """Whether a result is its input's own memory.

    `torch.export` writes a dropout that is off as a clone without a memory format, some versions, or leaves
    it out, others; run eagerly it gives its input back.
    """
    if node.op != "call_function":
        return False
    name = operator_name(node)
    return name in _VIEWS or (name == "clone" and arguments(node)["memory_format"] is None)


def _operator_cost(node: fx.Node) -> OperatorCost:
    return OperatorCost(
        operator_name(node), module_path(node), result_shape(node), flops(node), result_bytes(node)
    )


def _peak(traced: TracedGraph) -> int:
    """The most bytes alive at once when every result is freed after its last use (views keep their base)."""
    order = [node for node in traced.graph.nodes if node.op != "output" and node not in traced.tensors]
    base: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for step, node in enumerate(order):
        sources = [source for source in node.all_input_nodes if source in base]
        base[node] = base[sources[0]] if sources and _is_view(node) else node
        last |= {base[value]: step for value in (node, *sources)}
    last |= {base[output]: len(order) for output in traced.outputs}
    alive = peak = 0
    freed = [0] * (len(order) + 1)
    for value, step in last.items():
        freed[step] += result_bytes(value)
    for step, node in enumerate(order):
        alive += result_bytes(node) if base[node] is node else 0
        peak = max(peak, alive)
        alive -= freed[step]
    return peak
