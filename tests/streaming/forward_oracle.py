"""Streamed outputs of a network, in both forms of the row step, to hold against the whole image's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bigvision.streaming import StreamedModel
from bigvision.streaming.buffers import Scanner
from bigvision.streaming.forward import forward
from bigvision.streaming.program import Program
from bigvision.streaming.row_store import GivenRows
from bigvision.streaming.scan import Lines
from bigvision.streaming.schedule import schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.states import compact
from bigvision.streaming.statistics import Sums

CPU = torch.device("cpu")


def in_place(program: Program, image: Tensor, rows: int, scratch: Path | None = None) -> Tensor:
    """The output by the inference step, whose buffers are written in place."""
    channels, height, width = image.shape
    source = ImageRows(image, (channels, height, width), (height, width), image.dtype, CPU)
    pieces = list(forward(program, source, rows, scratch))
    if program.output not in program.stages:
        return pieces[0][1]
    axis, following = program.stages[program.output].axis, 0
    for row, y in pieces:
        assert row == following
        following += y.shape[axis]
    return torch.cat([y for _, y in pieces], axis)


def restored(program: Program, image: Tensor, rows: int) -> Tensor:
    """The output where every step begins anew from the state that the one before it left."""
    held: dict[fx.Node, Any] = program.finish({}, {n: w.detach() for n, w in program.traced.tensors.items()})
    channels, height, width = image.shape
    source = ImageRows(image, (channels, height, width), (height, width), image.dtype, CPU)
    given = GivenRows(program.traced.image, source)
    outputs: list[Tensor] = []
    for walk in program.passes:
        plan = schedule(walk, rows)
        lines: Lines = {}
        sums: dict[fx.Node, Sums] = {}
        for t in range(plan.steps):
            scanner = Scanner(walk, plan, held, given, image.dtype, CPU).restore(t, lines)
            result = scanner.advance(t)
            lines = compact(scanner.state(t + 1))
            for node, part in result.sums.items():
                sums[node] = program.statistics[node].merge(sums[node], part) if node in sums else part
            if result.output is not None:
                outputs.append(result.output)
        held = program.finish(sums, held)
    if program.output not in program.stages:
        return held[program.output]
    return torch.cat(outputs, program.stages[program.output].axis)


def error(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest magnitude."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} for {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{found.dtype} for {expected.dtype}"
    scale = float(expected.abs().max().clamp_min(1e-6)) if expected.numel() else 1.0
    return float((found - expected).abs().max()) / scale if expected.numel() else 0.0


def settled(model: nn.Module, image: Tensor, whole: Tensor, tolerance: float) -> bool:
    """Whether the network has a result to compare with: one that rounding of its image does not move.

    Where two values tie but for rounding (a reflected column and its mirror image), an argmax or a comparison
    jumps, in the whole image as in the streamed one.
    """
    torch.manual_seed(0)
    trials = (image * (1 + 1e-14 * torch.randn_like(image)) for _ in range(6))
    return all(error(model(trial[None]), whole) <= tolerance for trial in trials)


def model_error(model: nn.Module, shape: tuple[int, int, int], rows: int) -> tuple[float, int]:
    """(error, passes) of a float64 scene streamed through `StreamedModel`, padding included."""
    model.double().eval()
    image = torch.randn(shape, dtype=torch.float64)
    streamed = StreamedModel(model, shape, rows=rows, dtype=torch.float64)
    height, width = shape[1:]
    with torch.no_grad():
        whole = model(F.pad(image, (0, -width % streamed.stride, 0, -height % streamed.stride))[None])
        whole = whole["out"] if isinstance(whole, dict) else whole
        if whole.ndim == 4:
            whole = whole[..., :height, :width]
        # Random weights may leave the output tiny: the error is to count against what there is.
        size = float(whole.abs().max()) or 1.0
        return error(streamed(image) / size, whole / size), len(streamed.program.passes)
