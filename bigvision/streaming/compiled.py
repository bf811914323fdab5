"""A compiled pass: its operators merged, so that fewer walks over memory lie between two convolutions.

A convolution takes the activation that alone reads it along (a post-operation of oneDNN), and its weights are
packed once. A tree of elementwise operators, with the upsampling at its end, is one loop; so is max pooling,
which then makes no indices. `torch.compile` writes those loops, each for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from bigvision.graph.arguments import arguments
from bigvision.graph.trace import operator_name, result_shape
from bigvision.streaming.convolution import ACTIVATIONS, PackedConvolution
from bigvision.streaming.into import ELEMENTWISE, Writer
from bigvision.streaming.kernels import Span, Values, convolution, max_pool, pad_rows, repeats
from bigvision.streaming.program import Pass, Stage

# Below this many results an eager operator is done before a compiled loop is entered.
LEAST_RESULTS = 50_000

Loop = Callable[..., None]
"""Writes into its first argument what it computes of the others."""


class NoCompilerError(ValueError):
    """There is nothing to compile loops with."""


def require_compiler(device: torch.device) -> None:
    """NoCompilerError where a processor's loops can't be built."""
    from torch._inductor import cpp_builder  # 1.4 s and 170 MiB, for those alone who compile
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise NoCompilerError(
            "compiling needs a C++ compiler (g++, clang++ or the one that CXX names), and there is none"
        ) from error


def compiled(walk: Pass) -> Pass:
    """The pass with its operators merged: what it gives, sums and keeps is the same."""
    readers: dict[fx.Node, list[Stage]] = {stage.node: [] for stage in walk.stages}
    for stage in walk.stages:
        for source in stage.inputs:
            readers[source].append(stage)
    wanted = {*walk.given, *(one.source for one in walk.statistics), *(stage.node for stage in walk.spilled)}
    if walk.output is not None:
        wanted.add(walk.output.node)
    stages: dict[fx.Node, Stage] = {}
    for stage in walk.stages:
        private = [stages[s] for s in stage.inputs if s not in wanted and readers[s] == [stage]]
        merged = stage if stage.node in walk.given else _merged(stage, private, readers[stage.node])
        for part in private:
            if part.node in merged.operators:
                del stages[part.node]
        stages[stage.node] = merged
    return replace(
        walk,
        stages=tuple(stages.values()),
        spilled=tuple(stages[stage.node] for stage in walk.spilled),
        output=None if walk.output is None else stages[walk.output.node],
    )


def _merged(stage: Stage, private: list[Stage], readers: list[Stage]) -> Stage:
    """The stage with those of its `private` inputs that it can take along."""
    name = operator_name(stage.node)
    if name == "conv2d":
        return replace(stage, kernel=convolution(stage.node, PackedConvolution("none")))
    if name == "max_pool2d" and (stage.axis, len(stage.shape)) == (-2, 4):
        return _pooling(stage)
    followed = len(readers) == 1 and (_is_elementwise(readers[0]) or _factors(readers[0]) != (1, 1))
    if name in ACTIVATIONS and private and operator_name(private[0].node) == "conv2d" and not followed:
        kernel = convolution(private[0].node, PackedConvolution(name))
        careful = convolution(private[0].node, PackedConvolution(name, fused=False))
        operators = (private[0].node, stage.node)
        return replace(private[0], node=stage.node, operators=operators, kernel=kernel, careful=careful)
    parts = [part for part in private if _is_elementwise(part)]
    if parts and (_is_elementwise(stage) or _factors(stage) != (1, 1)):
        return _tree(stage, parts)
    return stage


def _is_elementwise(stage: Stage) -> bool:
    """Elementwise operators of maps alone, whose held operands are the same in all rows."""
    operands = {source for node in stage.operators for source in node.all_input_nodes}
    held = [result_shape(source) for source in operands - {*stage.inputs, *stage.operators}]
    return (
        all(operator_name(node) in ELEMENTWISE for node in stage.operators)
        and all(node.meta["val"].is_floating_point() for node in operands)
        and (stage.axis, stage.free, len(stage.shape)) == (-2, False, 4)
        and all(len(shape) < 2 or shape[-2] == 1 for shape in held)
    )


def _factors(stage: Stage) -> tuple[int, int]:
    """How often it repeats its input's rows and columns."""
    return (stage.axis == -2 and repeats(stage.node)) or (1, 1)


def _tree(stage: Stage, parts: list[Stage]) -> Stage:
    """The stage and what it takes along, as one loop."""
    operators = tuple(dict.fromkeys(node for part in (*parts, stage) for node in part.operators))
    sources = dict.fromkeys(source for node in operators for source in node.all_input_nodes)
    streamed = {source for part in (*parts, stage) for source in part.inputs} - {*operators}
    given = [source for source in sources if source not in operators]
    factors = _factors(stage)
    graph = fx.Graph()
    place = graph.placeholder("place")
    known = {source: graph.placeholder(source.name) for source in given}
    for node in operators:
        if node is stage.node and factors != (1, 1):
            known[node] = graph.call_function(_repeated, (known[node.all_input_nodes[0]], *factors))
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    loop = _compiled_loop(graph, place, known[stage.node])
    rows = factors[0]

    def write(values: Values, span: Span, place: Tensor) -> None:
        start, stop = span.read
        operands = [values(source) for source in given]
        if rows * (stop - start) == span.b - span.a:
            loop(place, *operands)
        else:
            around = _room(stage, operands, rows * (stop - start))
            loop(around, *operands)
            place.copy_(around.narrow(-2, span.a - rows * start, span.b - span.a))

    inputs = tuple(source for source in given if source in streamed)
    return _written(replace(stage, inputs=inputs, operators=operators), write)


def _pooling(stage: Stage) -> Stage:
    source, pooled = arguments(stage.node)["self"], max_pool(stage.node)
    graph = fx.Graph()
    place, x = graph.placeholder("place"), graph.placeholder("x")
    loop = _compiled_loop(graph, place, graph.call_function(F.max_pool2d, (x, *pooled)))

    def write(values: Values, span: Span, place: Tensor) -> None:
        loop(place, pad_rows(values(source), span, -torch.inf))

    return _written(stage, write)


def _written(stage: Stage, writer: Writer) -> Stage:
    """The stage with that writer; where it is given no place, its results have one of their own."""

    def kernel(values: Values, span: Span) -> Tensor:
        place = _room(stage, [values(source) for source in stage.inputs], span.b - span.a)
        writer(values, span, place)
        return place

    return replace(stage, writer=writer, kernel=kernel)


def _room(stage: Stage, operands: Sequence[Tensor], rows: int) -> Tensor:
    shape = (*stage.shape[:-2], rows, stage.shape[-1])
    dtype = reduce(torch.promote_types, (operand.dtype for operand in operands))
    return torch.empty(shape, dtype=dtype, device=operands[0].device, memory_format=torch.channels_last)


def _repeated(x: Tensor, rows: int, cols: int) -> Tensor:
    size = [x.shape[-2] * rows, x.shape[-1] * cols]
    y: Tensor = torch.ops.aten.upsample_nearest2d(x, size)
    return y


def _compiled_loop(graph: fx.Graph, place: fx.Node, result: fx.Node) -> Loop:
    graph.output(graph.call_method("copy_", (place, result)))
    eager = fx.GraphModule({}, graph)
    fused = torch.compile(eager)

    def run(place: Tensor, *operands: Tensor) -> None:
        if place.numel() < LEAST_RESULTS:
            eager(place, *operands)
            return
        for tensor in (place, *operands):
            if tensor.ndim == 4 and tensor.shape[-2] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
        fused(place, *operands)

    return run
