"""One network over one image too big for memory, row by row, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.graph import fold_batch_norm, trace_padded
from bigvision.streaming.backward import BackwardResult, Budget, backward
from bigvision.streaming.forward import forward
from bigvision.streaming.losses import Loss
from bigvision.streaming.program import compile_program
from bigvision.streaming.source import ImageRows, RowSource


class StreamedModel:
    """A network prepared for scenes of one shape.

    Args:
        model: an eval-mode network of [1, C, H, W]; the streamed network shares its parameters.
        shape: (C, H, W) of the scenes.
        rows: image rows a step.
        dtype: the precision to compute in.
        device: where to compute.

    Raises:
        UntraceableError, UnsupportedOperatorError: the network can't be streamed; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        *,
        rows: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.shape = shape
        self.rows, self.dtype, self.device = rows, dtype, torch.device(device)
        traced, self.stride = trace_padded(model.eval(), shape)
        self.program = compile_program(traced)

    def stream(self, source: RowSource) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, y): y [1, K, h, w] holds rows row .. row + h of the whole image's output, in order."""
        program = compile_program(fold_batch_norm(self.program.traced))
        image = ImageRows(source, self.shape, program.traced.shape[1:], self.dtype, self.device)
        for row, y in forward(program, image, self.rows):
            if program.output in program.stages:
                yield from self._cropped(row, y)
            else:
                yield row, y

    def __call__(self, source: RowSource) -> Tensor:
        """The whole output, [1, K, h, w], or what an image-level network returns."""
        pieces = [y for _, y in self.stream(source)]
        return torch.cat(pieces, -2) if pieces[0].ndim == 4 else pieces[0]

    def backward(
        self, source: RowSource, target: Any, loss: Loss, *, mask: Any = None, budget: Budget | None = None
    ) -> BackwardResult:
        """Add the exact gradient of `loss` over the whole scene to the parameters' `grad`.

        See `bigvision.streaming.backward.backward`: `target` is [H, W] or [K, H, W], sliceable by rows (for a
        network with one answer for the image, what the loss takes), `mask` [H, W] true where a pixel counts.
        """
        image = ImageRows(source, self.shape, self.program.traced.shape[1:], self.dtype, self.device)
        budget = budget or Budget(rows=self.rows)
        return backward(self.program, image, target, loss, mask=mask, budget=budget)

    def _cropped(self, row: int, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Without the rows and columns that only the padding gave."""
        (_, height, width), (_, high, wide) = self.shape, self.program.traced.shape
        size = self.program.stages[self.program.output].size
        rows = -(-height * size // high) - row
        cols = -(-width * y.shape[-1] // wide)
        if rows > 0:
            yield row, y[..., :rows, :cols]
