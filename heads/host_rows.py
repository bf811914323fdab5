"""Columns in host memory with a cache of hot rows on the device, as huge recommender embeddings are held.

A sampled step touches a few per cent of the rows, and the classes of frequent identities again and again:
these stay on the device, changed ones go back to the host when their place is needed. Rows are replaced
least recently used.

Legend: n classes of this shard, K rows of a tile, S places of the cache, D dimension.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heads.stores import Rows


class HostRows:
    """A `RowStore` on the host with a write-back cache of `cache_rows` rows on the device.

    The cache grows to the largest tile it is asked for. `hits` and `misses` count rows.
    """

    prefetches = False

    def __init__(
        self,
        names: Sequence[str],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        cache_rows: int,
    ) -> None:
        self.names = tuple(names)
        self.hits, self.misses = 0, 0
        self._shape, self._dtype, self._device = shape, dtype, device
        self._host = {n: torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda") for n in names}
        self._now = 0
        self._open(min(max(cache_rows, 1), max(shape[0], 1)))

    def _open(self, places: int) -> None:
        """An empty cache."""
        size = (places, self._shape[1])
        self._cache = {n: torch.zeros(size, dtype=self._dtype, device=self._device) for n in self.names}
        self._place = torch.full((self._shape[0],), -1, dtype=torch.int64)  # of each row
        self._row = torch.full((places,), -1, dtype=torch.int64)  # in each place
        self._used = torch.full((places,), -1, dtype=torch.int64)  # when last
        self._dirty = torch.zeros(places, dtype=torch.bool)

    def load(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """See `RowStore.load`."""
        places = self._bring_in(_indices(rows)).to(self._device)
        return {name: self._cache[name][places] for name in names}

    def store(self, rows: Rows, values: Mapping[str, Tensor]) -> None:
        """See `RowStore.store`."""
        places = self._bring_in(_indices(rows))
        self._dirty[places] = True
        for name, value in values.items():
            self._cache[name][places.to(self._device)] = value

    def prefetch(self, rows: Rows) -> None:
        """Nothing: backward still wants this step's rows in the cache."""

    def whole(self, name: str) -> Tensor:
        """See `RowStore.whole`."""
        self._write_back(self._dirty.nonzero()[:, 0])
        return self._host[name]

    def reload(self) -> None:
        """See `RowStore.reload`."""
        self._open(len(self._row))

    def to(self, device: torch.device) -> None:
        """See `RowStore.to`."""
        self._write_back(self._dirty.nonzero()[:, 0])
        self._device = device
        if device.type == "cuda":
            self._host = {name: column.pin_memory() for name, column in self._host.items()}
        self._open(len(self._row))

    def _bring_in(self, rows: Tensor) -> Tensor:
        """The places [K] of the rows, after making room for those that were not here."""
        if len(rows) > len(self._row):
            self._write_back(self._dirty.nonzero()[:, 0])
            self._open(len(rows))
        self._now += 1
        places = self._place[rows]
        here = places >= 0
        self._used[places[here]] = self._now
        absent = rows[~here]
        self.hits += len(rows) - len(absent)
        self.misses += len(absent)
        if len(absent):
            free = self._used.topk(len(absent), largest=False).indices
            self._replace(free, absent)
            places = self._place[rows]
        return places

    def _replace(self, places: Tensor, rows: Tensor) -> None:
        self._write_back(places[self._dirty[places]])
        old = self._row[places]
        self._place[old[old >= 0]] = -1
        self._row[places], self._place[rows], self._used[places] = rows, places, self._now
        for name in self.names:
            self._cache[name][places.to(self._device)] = self._host[name][rows].to(self._device)

    def _write_back(self, places: Tensor) -> None:
        for name in self.names:
            self._host[name][self._row[places]] = self._cache[name][places.to(self._device)].to("cpu")
        self._dirty[places] = False


def _indices(rows: Rows) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.to("cpu")
