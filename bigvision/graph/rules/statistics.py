"""Operators that need the whole image: reductions over rows and normalisations by its moments."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from bigvision.graph.arguments import reduced_axes
from bigvision.graph.layout import Flow, refusal
from bigvision.graph.rules.registry import layout_of, moved_layout, rule
from bigvision.graph.rules.row_by_row import by_channel
from bigvision.graph.trace import operator_name, result_shape


@rule(
    mean="self dim keepdim dtype",
    sum="self dim keepdim dtype",
    prod="self dim keepdim dtype",
    linalg_vector_norm="self ord dim keepdim dtype",
    amax="self dim keepdim",
    amin="self dim keepdim",
    max="self dim keepdim",
    min="self dim keepdim",
    argmax="self dim keepdim",
    argmin="self dim keepdim",
    std="self dim unbiased correction keepdim",
    var="self dim unbiased correction keepdim",
    std_mean="self dim unbiased correction keepdim",
    var_mean="self dim unbiased correction keepdim",
    logsumexp="self dim keepdim",
    any="self dim keepdim",
    all="self dim keepdim",
)
def _reduced(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    layout = layout_of(source)
    shape = result_shape(args["self"])
    along = [dim - len(shape) for dim in reduced_axes(args, shape)]
    if layout.rows in along:
        _check_statistic(node, args)
        return Flow(None, statistic=True)
    position: list[int | None] = [layout.rows, layout.cols]
    if not args.get("keepdim", False):
        for index, at in enumerate(position):
            if at is not None:
                position[index] = None if at in along else at + sum(dim > at for dim in along)
    return Flow(moved_layout(*position), local_columns=layout.cols not in along)


STATISTICS = frozenset(
    ("mean", "sum", "amax", "amin", "std", "var", "std_mean", "var_mean", "linalg_vector_norm")
)


def _check_statistic(node: fx.Node, args: dict[str, Any]) -> None:
    name = operator_name(node)
    extreme_alone = name in ("max", "min") and "dim" not in args
    if name not in STATISTICS and not extreme_alone:
        raise refusal(node, "it has no rule as a statistic over the image")
    if name == "linalg_vector_norm" and not 1 <= args["ord"] < math.inf:
        raise refusal(node, f"over the image it is supported for an ord of 1 or more, not ord={args['ord']}")


@rule(
    group_norm="input num_groups weight bias eps cudnn_enabled",
    native_group_norm="input weight bias N C HxW group eps",
    _native_batch_norm_legit="input weight bias training=True momentum eps",
    instance_norm="input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
)
def _normalised(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    """By moments of groups of channels, axis 1, over all axes behind it."""
    if not args.get("use_input_stats", True):  # instance norm by its running statistics
        return by_channel(node, args, source)
    if args.get("running_mean") is not None:
        raise refusal(node, "it moves its running statistics")
    layout = layout_of(source)
    if layout.rows < 2 - len(result_shape(node)):
        raise refusal(node, "it would treat rows as channels or images: its input has them on axis 0 or 1")
    return Flow(layout, statistic=True)
