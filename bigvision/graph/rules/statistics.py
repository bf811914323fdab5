"""Operators that need the whole image: reductions over rows and normalisations by its moments."""

from __future__ import annotations

from typing import Any

from torch import fx

from bigvision.graph.layout import Flow, refusal
from bigvision.graph.rules.registry import layout_of, moved_layout, negative, rule
from bigvision.graph.trace import operator_name, result_shape


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "std",
    "var",
    "argmax",
    "argmin",
    "linalg_vector_norm",
    "prod",
)
@rule("logsumexp", "any", "all", "var_mean")
def _reduced(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    shape = result_shape(args["self"])
    dims = args.get("dim")
    given = list(range(len(shape))) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    along = sorted((negative(dim, shape) for dim in given), reverse=True)
    if layout.rows in along:
        if operator_name(node) not in STATISTICS:
            raise refusal(node, "it has no rule as a statistic over the image")
        return Flow(None, statistic=True)
    position: list[int | None] = [layout.rows, layout.cols]
    if not args.get("keepdim", False):
        for index, at in enumerate(position):
            if at is not None:
                position[index] = None if at in along else at + sum(dim > at for dim in along)
    return Flow(moved_layout(*position), local_columns=layout.cols not in along)


STATISTICS = frozenset({"mean", "sum", "amax", "amin", "std", "var", "linalg_vector_norm"})


@rule("group_norm", "instance_norm", "native_group_norm", "_native_batch_norm_legit")
def _normalised(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    """By moments of groups of channels, axis 1, over all axes behind it."""
    layout = layout_of(source)
    if layout.rows < 2 - len(result_shape(node)):
        raise refusal(node, "it would treat rows as channels or images: its input has them on axis 0 or 1")
    return Flow(layout, statistic=True)
