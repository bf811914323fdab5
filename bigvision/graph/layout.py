"""How one operator's rows depend on its inputs': the value types of the flow of rows.

Legend: rows and columns are named by negative axes, so that [1, C, H, W] has rows -2 and columns -1, and
[1, H, W, C] rows -3 and columns -2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bigvision.graph.axes import AxisMap
from bigvision.graph.trace import describe


class UnsupportedOperatorError(ValueError):
    """An operator that no row rule covers; the message names it and its module path."""


@dataclass(frozen=True)
class Layout:
    """Where a streaming value keeps its rows and its columns (None: columns were merged or reduced away)."""

    rows: int = -2
    cols: int | None = -1


@dataclass(frozen=True, eq=False)
class Flow:
    """How one operator's result depends on its streaming inputs.

    Attributes:
        layout: where the result's rows lie; None where it is held whole.
        rows, cols: what each row and column reads; None: the same one.
        statistic: the operator needs the whole image before it can give anything (a reduction, or a
            normalisation by moments over the image).
        local_columns: false where a result depends on whole rows of its input, so that no tile can be exact.
        broadcasts: the operator takes its operands, held ones too, row for row.
    """

    layout: Layout | None
    rows: AxisMap | None = None
    cols: AxisMap | None = None
    statistic: bool = False
    local_columns: bool = True
    broadcasts: bool = False


HELD = Flow(None)


def refusal(node: fx.Node, why: str) -> UnsupportedOperatorError:
    """One sentence that names the operator, its module and a way out."""
    return UnsupportedOperatorError(
        f"{describe(node)} can't be computed row by row: {why}. Use the tile engine with an approximate "
        "halo, or replace that module."
    )
