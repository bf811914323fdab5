"""Where the wide columns of a shard live: its centres [n, D] and their moments.

The narrow ones, a number or two a class, always stay in memory. A tile of rows is loaded, changed and
stored; a contiguous tile on the device is a view, so storing it costs nothing.

Legend: n classes of this shard, K rows of a tile, D dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

STORAGE = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Rows = slice | Tensor  # a contiguous run of rows, or int64 [K], sorted and distinct


class RowStore(Protocol):
    """Columns of equal shape [n, D] and dtype, by name ("weight" and the optimiser's moments)."""

    names: tuple[str, ...]
    prefetches: bool  # whether it makes use of `prefetch`

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """The rows of the named columns, [K, D] each on the device; valid until the next load."""
        ...

    def store(self, rows: Rows, values: Mapping[str, Tensor]) -> None:
        """Puts rows back, changed. `values` may be what `load` gave or new tensors."""
        ...

    def prefetch(self, rows: Rows) -> None:
        """Says which rows the next step wants."""
        ...

    def whole(self, name: str) -> Tensor:
        """The column [n, D], made current, in the memory it lives in: checkpoints read and write it."""
        ...

    def reload(self) -> None:
        """Somebody has written into `whole`: forget what was cached of it."""
        ...

    def to(self, device: torch.device) -> None:
        """The work is done on another device from now on."""
        ...


class DeviceRows:
    """Columns in the memory of one device."""

    prefetches = False

    def __init__(
        self, names: Sequence[str], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.names = tuple(names)
        self._columns = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
        self._spare: dict[str, Tensor] = {}

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """See `RowStore.load`."""
        if isinstance(rows, slice):
            return {name: self.whole(name)[rows] for name in names}
        return {name: gather(self.whole(name), rows, self._spare, name) for name in names}

    def store(self, rows: Rows, values: Mapping[str, Tensor]) -> None:
        """See `RowStore.store`."""
        for name, value in values.items():
            scatter(self.whole(name), rows, value)

    def prefetch(self, rows: Rows) -> None:
        """Nothing to do: the rows are here."""

    def whole(self, name: str) -> Tensor:
        """See `RowStore.whole`."""
        return self._columns[name]

    def reload(self) -> None:
        """Nothing to do: nothing is cached."""

    def to(self, device: torch.device) -> None:
        """See `RowStore.to`."""
        self._columns = {name: column.to(device) for name, column in self._columns.items()}


class ParameterRows(DeviceRows):
    """Centres that are the parameter `weight` of a module: whatever tensor that is at the moment."""

    def __init__(self, owner: nn.Module) -> None:
        self.names = ("weight",)
        self._owner = owner
        self._spare = {}

    def whole(self, name: str) -> Tensor:
        """See `RowStore.whole`."""
        weight = self._owner.get_parameter(name)
        return weight.detach()

    def to(self, device: torch.device) -> None:
        """Nothing to do: parameters follow their module."""


def gather(column: Tensor, rows: Tensor, spare: dict[str, Tensor], name: str) -> Tensor:
    """column[rows] in a buffer kept in `spare`, which is valid until it is asked for again."""
    buffer = spare.get(name)
    if (
        buffer is None
        or len(buffer) < len(rows)
        or (buffer.dtype, buffer.device) != (column.dtype, column.device)
    ):
        buffer = spare[name] = column.new_empty(len(rows), column.shape[1])
    return torch.index_select(column, 0, rows, out=buffer[: len(rows)])


def scatter(column: Tensor, rows: Rows, value: Tensor) -> None:
    """column[rows] = value, for nothing where value is that very memory."""
    if not isinstance(rows, slice):
        column.index_copy_(0, rows, value)
    elif value.data_ptr() != column[rows].data_ptr():
        column[rows] = value
