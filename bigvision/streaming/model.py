"""One network over one image too big for memory, row by row, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dask.utils import parse_bytes
from torch import Tensor, nn

from bigvision.graph import fold_batch_norm, trace_padded
from bigvision.graph.cost import flops as cost_of
from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.streaming.backward import BackwardResult, backward
from bigvision.streaming.batch_norm import streaming_mode
from bigvision.streaming.checkpoints import BudgetError, Scratch
from bigvision.streaming.compiled import compiled, require_compiler
from bigvision.streaming.following import Following
from bigvision.streaming.footprint import forward_bytes
from bigvision.streaming.forecast import Budget, forward_rows, plan_backward, this_process
from bigvision.streaming.forward import forward
from bigvision.streaming.losses import Loss
from bigvision.streaming.plan import StreamPlan, pass_flops
from bigvision.streaming.program import compile_program
from bigvision.streaming.schedule import schedule
from bigvision.streaming.source import ImageRows, RowSource
from bigvision.streaming.spill import scratch_bytes, spilled


class StreamedModel:
    """A network prepared for scenes of one shape.

    Args:
        model: a network of [1, C, H, W]; computed as in eval mode, and left as it is. The streamed network
            shares its parameters and follows them.
        shape: (C, H, W) of the scenes. They are padded with zeros, below and on the right, to multiples of
            the network's total stride, and the output is cropped: that is the whole-image result.
        memory: what the process may take at its peak, in bytes or as "2GiB"; None: no limit.
        rows: image rows a step; None: planned from the width and the memory.
        scratch: (folder, bytes) for what a backward pass, or a forward one of many passes, spills; None:
            nothing is.
        dtype: the precision to compute in; gradients arrive in the parameters' own.
        device: where to compute.
        compile: merge operators of the forward stream's steps (see `compiled`); needs a C++ compiler.
        output: the output that counts, where the network returns several: a key, an attribute or a place,
            with dots between levels; None: as `bigvision.graph.main_output` has it.

    Raises:
        UntraceableError, UnsupportedOperatorError: the network can't be streamed; the message says why.
        BudgetError: the memory can't hold the smallest step.
        OutputError: several outputs may be meant, or none is the one named.
        NoCompilerError: `compile` without a C++ compiler.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        *,
        memory: int | str | None = None,
        rows: int | None = None,
        scratch: tuple[str | Path, int | str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compile: bool = False,
        output: str | int | None = None,
    ) -> None:
        self.shape = shape
        self.dtype, self.device = dtype, torch.device(device)
        limit = None if memory is None else parse_bytes(memory)
        spill = None if scratch is None else Scratch(Path(scratch[0]), parse_bytes(scratch[1]))
        self.budget = Budget(rows, limit, spill)
        with streaming_mode(model):
            traced, self.stride = trace_padded(model, shape, output)
        self._following = Following(model, traced.written)
        self.program = compile_program(fold_batch_norm(traced))
        self.inference = spilled(self.program, dtype, 0 if spill is None else spill.limit)
        if compile:
            require_compiler(self.device)
            self.inference = replace(self.inference, lower=compiled)
        self.rows, self._peak_bytes = forward_rows(
            self.inference, self.stride, dtype, this_process(shape), limit, rows
        )

    @cached_property
    def plan(self) -> StreamPlan:
        """What a stream over a scene takes."""
        program, flops = self.inference, pass_flops(self.inference)
        dense = sum(
            cost_of(stage.node) for stage in program.stages.values() if stage.node.op == "call_function"
        )
        try:
            training = plan_backward(self.program, self.dtype, self.budget.less(this_process(self.shape)))
        except (BudgetError, UnsupportedOperatorError):
            training = None
        return StreamPlan(
            rows=self.rows,
            steps=sum(schedule(walk, self.rows).steps for walk in program.passes),
            passes=len(program.passes),
            engine_bytes=forward_bytes(program, self.rows, self.dtype),
            peak_bytes=self._peak_bytes,
            flops=sum(flops),
            recomputation=sum(flops) / max(dense, 1) - 1,
            scratch_bytes=scratch_bytes(program, self.dtype),
            training=training,
        )

    def stream(self, source: RowSource) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, y): y [1, K, h, w] holds rows row .. row + h of the whole image's output, in order."""
        self._following.update(self.program.traced)
        image = self.image(source)
        folder = None if self.budget.scratch is None else self.budget.scratch.folder
        for row, y in forward(self.inference, image, self.rows, folder):
            if self.program.output in self.program.stages:
                yield from self._cropped(row, y)
            else:
                yield row, y

    def __call__(self, source: RowSource) -> Tensor:
        """The whole output, [1, K, h, w], or what an image-level network returns."""
        pieces = [y for _, y in self.stream(source)]
        stage = self.program.stages.get(self.program.output)
        return pieces[0] if stage is None else torch.cat(pieces, stage.axis)

    def backward(
        self, source: RowSource, target: Any, loss: Loss, *, mask: Any = None, budget: Budget | None = None
    ) -> BackwardResult:
        """Add the exact gradient of `loss` over the whole scene to the parameters' `grad`.

        See `bigvision.streaming.backward.backward`: `target` is [H, W] or [K, H, W], sliceable by rows (for a
        network with one answer for the image, what the loss takes), `mask` [H, W] true where a pixel counts;
        `budget` replaces the model's own.
        """
        self._following.update(self.program.traced)
        budget = budget or self.budget.less(this_process(self.shape))
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            return backward(self.program, self.image(source), target, loss, mask=mask, budget=budget)

    def image(self, source: RowSource) -> ImageRows:
        """A scene as this network's padded image."""
        return ImageRows(source, self.shape, self.program.traced.shape[1:], self.dtype, self.device)

    def _cropped(self, row: int, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Without the rows and columns that only the padding gave."""
        (_, height, width), (_, high, wide) = self.shape, self.program.traced.shape
        stage = self.program.stages[self.program.output]
        rows = -(-height * stage.size // high) - row
        if rows <= 0:
            return
        y = y.narrow(stage.axis, 0, min(rows, y.shape[stage.axis]))
        # Columns mostly follow the rows; on whichever axis they are, they grow as the rows do.
        axes = [axis for axis in (stage.axis + 1, *range(-1, -y.ndim - 1, -1)) if axis not in (0, stage.axis)]
        usual = -1 if stage.axis == -2 else None
        across = next((axis for axis in axes if y.shape[axis] * high == wide * stage.size), usual)
        yield row, y if across is None else y.narrow(across, 0, -(-width * y.shape[across] // wide))
