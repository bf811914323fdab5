"""Reading an ATen operator's arguments: by name, with defaults, pairs completed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by their schema names, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return values | node.kwargs


def same_value(value: Any, other: Any) -> bool:
    """Whether two values of one argument mean the same; a list is no different from a tuple."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return list(value) == list(other)
    return type(value) is type(other) and bool(value == other)


def reduced_axes(args: dict[str, Any], shape: tuple[int, ...]) -> list[int]:
    """The axes that a reduction runs over, from 0; all where it names none."""
    dims = args.get("dim")
    given = range(len(shape)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    return [dim % len(shape) for dim in given]


def pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of an argument that may be given once for both."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def convolution_padding(
    args: dict[str, Any], kernel: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) for rows and for columns; "same" pads the odd one behind, as ATen does."""
    padding = args["padding"]
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, pair(args["dilation"]), strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    rows, cols = pair(padding)
    return (rows, rows), (cols, cols)


def pad_mode(name: str, args: dict[str, Any]) -> str:
    """constant, reflect, replicate or circular."""
    fixed = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}
    return fixed.get(name) or args.get("mode", "constant")


INTERPOLATIONS = {
    "upsample_nearest2d": "nearest",
    "_upsample_nearest_exact2d": "nearest_exact",
    "upsample_bilinear2d": "bilinear",
    "upsample_bicubic2d": "bicubic",
}


def resample_factors(args: dict[str, Any]) -> tuple[float | None, float | None]:
    """The scale factors that the operator was given, for rows and columns; None where sizes decide."""
    given = args.get("scale_factors")
    return (given[0], given[1]) if given else (None, None)
