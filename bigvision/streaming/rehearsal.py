"""Every row kernel, statistic and derivative is tried on tensors without memory, before any work starts.

The graph's own shapes say what rows there must be. What fails, or makes others, is refused by name: no other
exception may come out of a stream that has read half a scene.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bigvision.graph.layout import UnsupportedOperatorError, refusal
from bigvision.graph.trace import operator_name
from bigvision.streaming.kernels import Span
from bigvision.streaming.scan import held_rows
from bigvision.streaming.statistics import NORMALISATIONS, Statistic

if TYPE_CHECKING:  # a program is rehearsed as it is compiled
    from bigvision.streaming.program import Program, Stage

Known = dict[fx.Node, Any]
Active = Set[fx.Node]

_differentiable: WeakSet[Program] = WeakSet()


def rehearse(program: Program) -> Program:
    """The program itself, once every operator of it has run on rows from the top, the middle and the bottom.

    Raises:
        UnsupportedOperatorError: one does not give the rows that it should; the message names it.
    """
    with torch.no_grad():
        known = _held(program)
        for stage in program.stages.values():
            for span in _spans(stage):
                _require_rows(stage, span, known)
    return program


def require_differentiable(program: Program, active: Active) -> None:
    """Differentiate every operator of the `active` ones, those that depend on parameters, once.

    Raises:
        UnsupportedOperatorError: one has no derivative; the message names it.
    """
    if program in _differentiable:
        return
    known = _held(program)
    leaves = _leaves(known, active)
    tried: set[Any] = set()
    for node in program.traced.operators():
        if _complex(node) and any(one in active for one in node.all_input_nodes):
            raise refusal(node, "a gradient does not go through complex numbers here")
        # Whether there is a derivative depends on the operator and on what it is taken by, not on shapes.
        case = (node.target, node in program.stages, tuple(one in active for one in node.all_input_nodes))
        if node not in active or not _floating(node) or case in tried:
            continue
        tried.add(case)
        stage = program.stages.get(node)
        with torch.enable_grad():
            if stage is not None:
                _differentiate(node, _run, stage, next(_spans(stage)), leaves, active)
            elif node in program.statistics:
                statistic = program.statistics[node]
                _differentiate(node, _summed, statistic, program.stages[statistic.source], active)
            elif node in program.held:
                _differentiate(node, _computed, node, leaves)
    _differentiable.add(program)


def _spans(stage: Stage) -> Iterator[Span]:
    """Some rows at the top, one in the middle, the last one; where all are alike, the first."""
    if stage.node.op != "call_function" or not stage.size:
        return
    if stage.rows is None:
        yield stage.span(0, min(2, stage.size))
        return
    starts = {0: min(2, stage.size), stage.size // 2: stage.size // 2 + 1, stage.size - 1: stage.size}
    for a, b in sorted(starts.items()):
        yield stage.span(a, b)


def _require_rows(stage: Stage, span: Span, known: Known) -> None:
    try:
        result = _run(stage, span, known)
    except NotImplementedError as error:
        if "meta tensor" in str(error):  # a copy to a device, of which there is nothing to try
            return
        raise _failed(stage.node, "its rows can't be computed by themselves", error) from error
    except Exception as error:
        raise _failed(stage.node, "its rows can't be computed by themselves", error) from error
    made = [_kind(one) for one in pytree.tree_leaves(result)]
    wanted = [_kind(one) for one in _rows(stage.node, stage.axis, span.b - span.a)]
    several = isinstance(stage.node.meta["val"], list)  # of a tuple's parts the first is the operator's
    if made != wanted if several else made[:1] != wanted[:1]:
        raise refusal(stage.node, f"its rows {span.a}..{span.b} would be {made[0]}, not {wanted[0]}")


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} of {value.dtype}"


def _run(stage: Stage, span: Span, known: Known, active: Active = frozenset()) -> Any:
    """The stage's rows."""
    start, stop = span.read
    inputs: Known = {}

    def values(source: fx.Node) -> Any:
        if source not in stage.inputs:
            return held_rows(stage, span, known[source])
        if source not in inputs:
            rows = _rows(source, stage.input_axis, stop - start)
            if source in active:
                rows = [one.requires_grad_(one.is_floating_point()) for one in rows]
            inputs[source] = tuple(rows) if isinstance(source.meta["val"], list | tuple) else rows[0]
        return inputs[source]

    return stage.kernel(values, span)


def _rows(node: fx.Node, axis: int, rows: int) -> list[Tensor]:
    """A node's results with so many rows."""
    found = []
    for one in pytree.tree_leaves(node.meta["val"]):
        shape = list(one.shape)
        if -axis <= len(shape):
            shape[axis] = rows
        found.append(torch.empty(shape, dtype=one.dtype, device="meta"))
    return found


def _held(program: Program) -> Known:
    """Held values, and what statistics finish into."""
    known: Known = {}
    for node in (*program.traced.tensors, *program.held):
        known[node] = pytree.tree_map(lambda one: torch.empty_like(one, device="meta"), node.meta["val"])
    for node, statistic in program.statistics.items():
        try:
            known[node] = _summed(statistic, program.stages[statistic.source])
        except Exception as error:
            raise _failed(node, "it can't be summed over the rows", error) from error
        made, wanted = (_kind(pytree.tree_leaves(one)[0]) for one in (known[node], node.meta["val"]))
        if operator_name(node) not in NORMALISATIONS and made != wanted:
            raise refusal(node, f"summed over the rows it would be {made}, not {wanted}")
    return known


def _summed(statistic: Statistic, source: Stage, active: Active = frozenset()) -> Any:
    """What a statistic's sums over two rows, and the same again, finish into."""
    rows = _rows(source.node, source.axis, min(2, source.size))[0]
    with torch.no_grad():
        sums = statistic.partial(rows, 0)
    if source.node in active:
        sums = statistic.differentiable_partial(rows.requires_grad_(), 0, sums)
    return statistic.finish(statistic.merge(sums, sums))


def _computed(node: fx.Node, known: Known) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _leaves(known: Known, active: Active) -> Known:
    def leaf(one: Any) -> Any:
        return one.detach().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one

    return {node: pytree.tree_map(leaf, value) if node in active else value for node, value in known.items()}


def _complex(node: fx.Node) -> bool:
    return any(one.is_complex() for one in pytree.tree_leaves(node.meta["val"]))


def _floating(node: fx.Node) -> bool:
    return any(one.is_floating_point() for one in pytree.tree_leaves(node.meta["val"]))


def _differentiate(node: fx.Node, run: Any, *args: Any) -> None:
    try:
        results = [
            one for one in pytree.tree_leaves(run(*args)) if isinstance(one, Tensor) and one.requires_grad
        ]
        torch.autograd.backward(results, [torch.ones_like(one) for one in results])
    except Exception as error:
        if "meta" not in str(error).lower():  # a derivative that is there, but not for these tensors
            raise _failed(node, "it has no derivative", error) from error


def _failed(node: fx.Node, what: str, error: Exception) -> UnsupportedOperatorError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return refusal(node, f"{what} ({lines[0].rstrip('.') if lines else type(error).__name__})")
