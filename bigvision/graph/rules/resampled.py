"""Operators that resample rows: interpolation and adaptive pooling."""

from __future__ import annotations

from typing import Any

from torch import fx

from bigvision.graph import axes
from bigvision.graph.arguments import (
    INTERPOLATIONS,
    resample_factors,
)
from bigvision.graph.layout import Flow
from bigvision.graph.resampling import area_taps, interpolation_taps
from bigvision.graph.rules.registry import nchw, rule
from bigvision.graph.trace import operator_name, result_shape

# Rows per bin up to which adaptive pooling is a sliding window (area resampling); above, it is a statistic.
WIDEST_STREAMED_BIN = 16


@rule(
    upsample_nearest2d="input output_size scale_factors",
    _upsample_nearest_exact2d="input output_size scale_factors",
    upsample_bilinear2d="input output_size align_corners scale_factors",
    upsample_bicubic2d="input output_size align_corners scale_factors",
)
def _interpolated(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["input"]), result_shape(node)
    factors = resample_factors(args)
    kind = INTERPOLATIONS[operator_name(node)]
    rows, cols = (
        axes.taps(
            interpolation_taps(
                kind,
                before[a - 2],
                after[a - 2],
                align_corners=args.get("align_corners", False),
                factor=factors[a],
                dtype=node.meta["val"].dtype,
            ).index,
            before[a - 2],
            drifts=args.get("align_corners", False) and before[a - 2] != after[a - 2],
        )
        for a in (0, 1)
    )
    return Flow(nchw(node, source), rows, cols)


@rule(adaptive_avg_pool2d="self output_size", _adaptive_avg_pool2d="self output_size")
def _adaptive_average(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    before, after = result_shape(args["self"])[-2:], result_shape(node)[-2:]
    layout = nchw(node, source)
    if before[0] > WIDEST_STREAMED_BIN * after[0] or (before != after and after[0] == 1):
        return Flow(None, statistic=True)
    # How many bins there are, and not how wide, is fixed: a tile's would be others.
    rows, cols = (
        axes.taps(area_taps(before[a], after[a]).index, before[a], drifts=before[a] != after[a])
        for a in (0, 1)
    )
    return Flow(layout, rows, cols)


@rule(adaptive_max_pool2d="self output_size")
def _adaptive_maximum(node: fx.Node, args: dict[str, Any], source: Flow) -> Flow:
    nchw(node, source)
    return Flow(None, statistic=True)
