"""A traced network as a program of stages: what streams, what is held, which passes over the image it takes.

Every statistic over the image ends a pass: what depends on it can only run in a later one. A stage's level is
the number of passes that must have ended before it can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from bigvision.graph.arguments import arguments
from bigvision.graph.axes import AxisMap
from bigvision.graph.cost import flops
from bigvision.graph.flow import flows, streaming_inputs
from bigvision.graph.layout import Flow
from bigvision.graph.trace import TracedGraph, operator_name, result_shape
from bigvision.streaming.into import Writer, writer_for
from bigvision.streaming.kernels import Kernel, Span, Values, kernel_for, span_of
from bigvision.streaming.rehearsal import rehearse
from bigvision.streaming.statistics import NORMALISATIONS, Statistic, normalise, statistic_for


@dataclass(frozen=True, eq=False)
class Stage:
    """One streaming operator.

    Attributes:
        node: the operator in the traced graph; of several merged ones the last.
        operators: all of them, in execution order.
        inputs: its streaming inputs.
        rows: which input rows its rows read; None: the same.
        axis: the (negative) axis of its rows; `size` how many it has, `size_in` its inputs.
        level: how many passes end before it can run.
        input_axis: the axis of its inputs' rows.
        free: it depends on no image row, only on held values, so it runs when its consumers ask.
        broadcasts: it takes its inputs, held ones too, row for row.
        kernel: computes some of its rows; `writer` does so in a given place, where the operator can.
        careful: a kernel for rows that may not be finite, where `kernel` would lose NaN.
    """

    node: fx.Node
    operators: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rows: AxisMap | None
    axis: int
    size: int
    size_in: int
    input_axis: int
    level: int
    free: bool
    broadcasts: bool
    kernel: Kernel
    writer: Writer | None
    careful: Kernel | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its (first) result over the whole image."""
        return result_shape(self.node)

    @property
    def flops(self) -> int:
        """Of all rows."""
        return sum(map(flops, self.operators))

    @property
    def grows(self) -> bool:
        """It resamples a held value up to rows of an image."""
        return not self.inputs and self.rows is not None

    def span(self, a: int, b: int) -> Span:
        """What its rows a..b read."""
        return span_of(self.rows, self.size_in, a, b)


@dataclass(frozen=True, eq=False)
class Pass:
    """One walk over the image.

    Attributes:
        height: rows of the image; they set the pace.
        stages: what it runs, in execution order.
        given: the stages among them that are read, not computed: the image, and values that an earlier pass
            spilled.
        spilled: the stages whose rows are kept for later passes.
        statistics: what it sums.
        output: the stage whose rows it emits, in the last pass.
        shares: of a part of a walk, which rows of a stage it sums and keeps; all where a stage isn't named.
    """

    height: int
    stages: tuple[Stage, ...]
    given: frozenset[fx.Node]
    spilled: tuple[Stage, ...]
    statistics: tuple[Statistic, ...]
    output: Stage | None
    shares: Mapping[fx.Node, tuple[int, int]] = field(default_factory=dict)

    def share(self, stage: Stage, a: int, b: int) -> tuple[int, int]:
        """Those of a stage's rows a..b that this walk sums and keeps; others only serve its operators."""
        first, last = self.shares.get(stage.node, (0, stage.size))
        return max(a, first), max(min(b, last), a, first)


def _as_it_is(walk: Pass) -> Pass:
    return walk


@dataclass(frozen=True, eq=False)
class Boundary:
    """Values kept in scratch storage at the end of pass `after`, from which the later ones start."""

    after: int
    values: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class Program:
    """A network ready to be streamed.

    Attributes:
        traced: the graph it was made from.
        stages: every streaming stage, in execution order, the image first.
        held: the operators on whole values, in execution order.
        statistics: by the node they finish into (or normalise).
        levels: of every node, how many passes end before it can run.
        output: the node whose value the network returns.
        boundaries: where passes start from values kept in scratch storage, not from the image.
        lower: what is made of every pass before it is run.
    """

    traced: TracedGraph
    stages: dict[fx.Node, Stage]
    held: tuple[fx.Node, ...]
    statistics: dict[fx.Node, Statistic]
    levels: dict[fx.Node, int]
    output: fx.Node
    boundaries: tuple[Boundary, ...] = ()
    lower: Callable[[Pass], Pass] = _as_it_is

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The walks over the image, in order."""
        ends = {boundary.after: boundary.values for boundary in self.boundaries}
        walks, given = [], frozenset[fx.Node]()
        for index in range(self.depth):
            kept = ends.get(index, frozenset())
            walks.append(self.lower(self.walk(index, given, kept - given)))
            given = kept or given
        return tuple(walks)

    @cached_property
    def depth(self) -> int:
        """How many passes there are."""
        ends = [self.levels[node] for node in self.statistics]
        if self.output in self.stages:
            ends.append(self.stages[self.output].level + 1)
        return max(ends)

    def walk(
        self, index: int, given: Set[fx.Node] = frozenset(), spilled: Set[fx.Node] = frozenset()
    ) -> Pass:
        """Pass `index`, starting from the values `given` beside the image and keeping the `spilled` ones."""
        image = self.traced.image
        statistics = tuple(one for node, one in self.statistics.items() if self.levels[node] == index + 1)
        wanted = {one.source for one in statistics} | set(spilled)
        if not given:
            wanted.add(image)
        output = self.stages.get(self.output) if index == self.depth - 1 else None
        if output is not None:
            wanted.add(output.node)
        for stage in reversed(self.stages.values()):
            if stage.node in wanted and stage.node not in given:
                wanted.update(stage.inputs)
        return Pass(
            self.stages[image].size,
            tuple(
                _read(stage) if node in given else stage
                for node, stage in self.stages.items()
                if node in wanted
            ),
            frozenset(wanted & {image, *given}),
            tuple(self.stages[node] for node in self.stages if node in spilled),
            statistics,
            output,
        )

    def finish(
        self, sums: dict[fx.Node, tuple[Tensor, ...]], known: dict[fx.Node, Any]
    ) -> dict[fx.Node, Any]:
        """Every held value that the weights (`known`) and the `sums` taken so far determine."""
        values = dict(known)
        values |= {node: self.statistics[node].finish(taken) for node, taken in sums.items()}
        for node in self.held:
            if node not in values and all(source in values for source in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values


def compile_program(traced: TracedGraph) -> Program:
    """Lower a traced graph to stages.

    Raises:
        UnsupportedOperatorError: an operator that no row rule covers, or that does not make the rows that it
            should, by name and module path.
    """
    known = flows(traced)
    output = traced.output
    statistics = {}
    for node, flow in known.items():
        if flow.statistic:
            source = streaming_inputs(node, known)[0]
            statistics[node] = statistic_for(node, source, known[source].layout.rows)  # type: ignore[union-attr]
    levels, free = _levels(known, statistics)
    stages: dict[fx.Node, Stage] = {}
    for node, flow in known.items():
        if flow.layout is not None and (node is not traced.image or _used(node, known, output)):
            stages[node] = _stage(node, flow, known, levels[node], free[node])
    if traced.image not in stages:
        raise ValueError("the network's output does not depend on the image")
    held = tuple(n for n, f in known.items() if f.layout is None and n.op == "call_function")
    held = tuple(node for node in held if node not in statistics)
    return rehearse(Program(traced, stages, held, statistics, levels, output))


def _used(image: fx.Node, known: dict[fx.Node, Flow], output: fx.Node) -> bool:
    return image is output or any(user in known for user in image.users)


def _levels(
    known: dict[fx.Node, Flow], statistics: Iterable[fx.Node]
) -> tuple[dict[fx.Node, int], dict[fx.Node, bool]]:
    levels: dict[fx.Node, int] = {}
    free: dict[fx.Node, bool] = {}
    ends = set(statistics)
    for node, flow in known.items():
        sources = [source for source in node.all_input_nodes if source in levels]
        levels[node] = max((levels[source] for source in sources), default=0) + (node in ends)
        streamed = [source for source in sources if known[source].layout is not None]
        free[node] = node.op == "call_function" and all(free[source] for source in streamed)
        if flow.layout is None:
            free[node] = True
    return levels, free


def _stage(node: fx.Node, flow: Flow, known: dict[fx.Node, Flow], level: int, free: bool) -> Stage:
    assert flow.layout is not None
    inputs = tuple(streaming_inputs(node, known))
    axis = flow.layout.rows
    size = result_shape(node)[axis]
    size_in = size
    if node.op == "call_function" and flow.rows is not None:
        size_in = flow.rows.size_in
    if operator_name(node) in NORMALISATIONS and flow.statistic:
        kernel = _normalisation(node)
    elif node.op == "placeholder":
        kernel = _unreachable
    else:
        kernel = kernel_for(node, flow)
    input_axis = next((known[source].layout.rows for source in inputs), axis)  # type: ignore[union-attr]
    writer = writer_for(node) if node.op == "call_function" else None
    return Stage(
        node,
        (node,),
        inputs,
        flow.rows,
        axis,
        size,
        size_in,
        input_axis,
        level,
        free,
        flow.broadcasts,
        kernel,
        writer,
    )


def _normalisation(node: fx.Node) -> Kernel:
    args = arguments(node)
    weight, bias = args.get("weight"), args.get("bias")
    several = operator_name(node).startswith(("native", "_native"))

    def run(values: Values, span: Span) -> Any:
        given = [None if one is None else values(one) for one in (weight, bias)]
        y = normalise(node, values(args["input"]), values(node), given[0], given[1])
        return (y,) if several else y

    return run


def _read(stage: Stage) -> Stage:
    """The stage as one whose rows are given."""
    return replace(stage, inputs=(), rows=None, kernel=_unreachable, writer=None)


def _unreachable(values: Values, span: Span) -> Any:
    raise AssertionError("given rows are read, not computed")
