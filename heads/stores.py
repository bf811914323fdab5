"""Where the wide columns of a shard live: its centres [n, D] and their moments.

The narrow ones, a number or two a class, always stay in memory. A tile of rows is loaded, changed and stored; a
contiguous tile on the device is a view, so storing it costs nothing.

Legend: n classes of this shard, K rows of a tile, D dimension.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Rows = slice | Tensor  # a contiguous run of rows, or int64 [K], sorted and distinct


class RowStore(Protocol):
    """Columns of equal shape [n, D] and dtype, by name ("weight" and the optimiser's moments)."""

    names: tuple[str, ...]

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """The rows of the named columns, [K, D] each. Overwritten by the next load, and only valid until then."""
        ...

    def store(self, rows: Rows, values: dict[str, Tensor]) -> None:
        """Puts back what `load` gave, changed."""
        ...

    def whole(self, name: str) -> Tensor:
        """The column [n, D] as a tensor that checkpoints can read and write (a view wherever that is possible)."""
        ...

    def prefetch(self, rows: Rows) -> None:
        """Says which rows are wanted next. May do nothing."""
        ...

    def flush(self) -> None:
        """Makes `whole` and what lies below it current."""
        ...


class DeviceRows:
    """Columns in the memory of one device."""

    def __init__(
        self, names: Sequence[str], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.names = tuple(names)
        self._columns = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
        self._spare: dict[str, Tensor] = {}

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        if isinstance(rows, slice):
            return {name: self._columns[name][rows] for name in names}
        return {name: self._gather(name, rows) for name in names}

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        column = self._columns[name]
        spare = self._spare.get(name)
        if spare is None or len(spare) < len(rows):
            spare = self._spare[name] = column.new_empty(len(rows), column.shape[1])
        return torch.index_select(column, 0, rows, out=spare[: len(rows)])

    def store(self, rows: Rows, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            column = self._columns[name]
            if not isinstance(rows, slice):
                column.index_copy_(0, rows, value)
            elif value.data_ptr() != column[rows].data_ptr():
                column[rows] = value

    def whole(self, name: str) -> Tensor:
        return self._columns[name]

    def prefetch(self, rows: Rows) -> None:
        """Nothing to do: the rows are here."""

    def flush(self) -> None:
        """Nothing to do: the rows are here."""
