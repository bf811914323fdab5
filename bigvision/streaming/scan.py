"""What both forms of the row step share: (image rows, line buffers) -> (output rows, sums, line buffers).

The image is a sequence and the line buffers are its state. `buffers.py` has the step for inference, whose
buffers are written in place, `tape.py` the one that is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from bigvision.graph.trace import result_shape
from bigvision.streaming.kernels import Span
from bigvision.streaming.statistics import Sums

if TYPE_CHECKING:  # a program is rehearsed as it is compiled
    from bigvision.streaming.program import Stage

Lines = dict[fx.Node, Tensor]
"""The line buffers between two steps: of every stage the rows kept[t] .. made[t], where there are any."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        row: the image's output row that `output` starts at.
        output: [1, K, h, w], or None where no output row became ready.
        sums: of every statistic with new rows, by the node it finishes into.
    """

    row: int
    output: Tensor | None
    sums: dict[fx.Node, Sums]


def no_rows(node: fx.Node, axis: int, like: Tensor) -> Tensor:
    """A stage's rows where it has none: what padding alone is added to."""
    shape = list(result_shape(node))
    shape[axis] = 0
    return like.new_empty(shape)


def held_rows(stage: Stage, span: Span, value: Any) -> Any:
    """A held value as a stage's rows a..b see it: whole, unless it has a row for every row of theirs."""
    if not isinstance(value, Tensor):
        return value
    if stage.grows and value.ndim == 4:
        start, stop = span.read
        return value.narrow(-2, start, stop - start)
    axis = stage.input_axis
    if stage.broadcasts and value.ndim >= -axis and value.shape[axis] == stage.size > 1:
        return value.narrow(axis, span.a, span.b - span.a)
    return value
