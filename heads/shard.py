"""One rank's classes, walked tile by tile: the denominator forward, gradients and fused update backward.

Legend: n classes of this shard, A active ones, K of a tile, B gathered samples, D dimension.
acc is float64 where the centres are float64, else float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heads import kernels
from heads.partition import ClassRange
from heads.stores import Rows, RowStore


@dataclass(frozen=True)
class ActiveRows:
    """The classes that take part in a step: rows int64 [A] of this shard, sorted, or None for all of them.

    log_weight acc [A] is added to their logits (log(1/r) for a class kept with probability r), or None for 0.
    """

    rows: Tensor | None = None
    log_weight: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """Active classes [low, high) of the walk: their rows, and which samples [m] own a class (its place [m]) in it."""

    low: int
    high: int
    rows: Rows
    samples: Tensor
    places: Tensor


class Workspace:
    """Buffers that outlive a tile and a step: fresh memory is faulted in page by page, which costs more than the work."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialised [rows, columns] tensor of the dtype and device of `like`."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


@dataclass
class Shard:
    """A rank's centres with everything the walk needs. `inverse_norm` acc [n] is kept true as rows move."""

    classes: ClassRange
    store: RowStore
    inverse_norm: Tensor
    scale: float
    normalized: bool
    tile: int
    workspace: Workspace

    @property
    def acc(self) -> torch.dtype:
        return self.inverse_norm.dtype

    def row_scale(self, rows: Rows) -> Tensor:
        """What a raw product w.u is multiplied by to be a logit: scale/|w|, or scale. acc [K]."""
        inverse = self.inverse_norm[rows]
        return inverse * self.scale if self.normalized else torch.full_like(inverse, self.scale)

    def own_rows(self, labels: Tensor) -> Tensor:
        """The row of each label in this shard, -1 where it lives elsewhere or the sample is ignored. int64 [B]."""
        here = (labels >= self.classes.start) & (labels < self.classes.stop)
        return torch.where(here, labels - self.classes.start, -1)


def tiles(shard: Shard, active: ActiveRows, own_rows: Tensor) -> Iterator[Tile]:
    """Cuts the active classes into tiles. Every own class must be active."""
    count = len(shard.classes) if active.rows is None else len(active.rows)
    places = own_rows if active.rows is None else torch.searchsorted(active.rows, own_rows)
    places = torch.where(own_rows >= 0, places, -1)
    order = places.argsort(stable=True)
    ranked = places[order]
    edges = [*range(0, count, shard.tile), count]
    cuts = torch.searchsorted(ranked, torch.tensor(edges, device=ranked.device)).tolist()
    for low, high, first, last in zip(edges, edges[1:], cuts, cuts[1:], strict=False):
        rows = slice(low, high) if active.rows is None else active.rows[low:high]
        yield Tile(low, high, rows, order[first:last], ranked[first:last] - low)


def tile_products(shard: Shard, tile: Tile, w: Tensor, u: Tensor) -> Tensor:
    """w.u of a tile, [K, B] in the centres' dtype, with each sample's own class masked."""
    z = shard.workspace.take("z", (len(w), len(u)), w)
    torch.mm(w, u.t(), out=z)
    if len(tile.samples):
        z[tile.places, tile.samples] = kernels.MASKED
    return z


def own_cosines(shard: Shard, unit: Tensor, own_rows: Tensor) -> Tensor:
    """The (unscaled) logit of each sample's own class with unit acc [B, D], acc [B]; 0 where this shard doesn't hold it."""
    held = own_rows >= 0
    out = torch.zeros(len(unit), dtype=shard.acc, device=unit.device)
    rows, inverse = own_rows[held].unique(return_inverse=True)
    if len(rows):
        w = shard.store.load(rows, ("weight",))["weight"].to(shard.acc)
        if shard.normalized:
            w = w * shard.inverse_norm[rows][:, None]
        out[held] = (w[inverse] * unit[held]).sum(1)
    return out


def denominators(shard: Shard, active: ActiveRows, u: Tensor, own_rows: Tensor, shift: float) -> Tensor:
    """Sum over the active classes but the own one of exp(logit + log_weight - shift), float64 [B]."""
    total = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for tile in tiles(shard, active, own_rows):
        w = shard.store.load(tile.rows, ("weight",))["weight"]
        z = tile_products(shard, tile, w, u)
        row_scale = shard.row_scale(tile.rows)
        total += kernels.sum_exp(z, row_scale, _offset(active, tile, row_scale) - shift)
    return total


def _offset(active: ActiveRows, tile: Tile, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if active.log_weight is None else active.log_weight[tile.low : tile.high]


@dataclass(frozen=True)
class Slopes:
    """What backward knows of each sample: log of its denominator, its weight in the loss, and of its own class the
    slope dL/dlogit and the cosine. acc [B] each."""

    lse: Tensor
    coefficient: Tensor
    own_slope: Tensor
    own_cosine: Tensor


# rows, {column: tile}, gradient products [K, D], what the projection takes off w [K] -> the tiles changed in place
Update = Callable[[Rows, dict[str, Tensor], Tensor, Tensor], None]


def walk_back(
    shard: Shard, active: ActiveRows, u: Tensor, own_rows: Tensor, slopes: Slopes, update: Update | None
) -> Tensor:
    """Gradient of the loss with respect to u from this shard's classes, acc [B, D]; each tile is updated on the way.

    A class's gradient is complete inside its tile: dL/dw = g^T u - (q/|w|^2) w, with g the tile of slopes over the
    norms and q = sum_b dL/dc * c.
    """
    d_u = torch.zeros(len(u), u.shape[1], dtype=shard.acc, device=u.device)
    names = shard.store.names if update else ("weight",)
    for tile in tiles(shard, active, own_rows):
        columns = shard.store.load(tile.rows, names)
        w = columns["weight"]
        g, projection = _tile_slopes(shard, active, tile, w, u, slopes)
        _add_product(shard, d_u, g, w)
        if update is not None:
            d_w = torch.mm(g, u, out=shard.workspace.take("d_w", (len(w), u.shape[1]), w))
            update(tile.rows, columns, d_w, projection)
            shard.store.store(tile.rows, columns)
    return d_u


def _tile_slopes(
    shard: Shard, active: ActiveRows, tile: Tile, w: Tensor, u: Tensor, slopes: Slopes
) -> tuple[Tensor, Tensor]:
    """The slopes [K, B] over the norms, in the centres' dtype, and q/|w|^2 [K]."""
    z = tile_products(shard, tile, w, u)
    row_scale = shard.row_scale(tile.rows)
    log_weight = _offset(active, tile, row_scale)
    q = kernels.softmax_gradient_(z, row_scale, log_weight, slopes.lse, slopes.coefficient)
    if len(tile.samples):
        slope = slopes.own_slope[tile.samples] * row_scale[tile.places]
        z[tile.places, tile.samples] = slope.to(z.dtype)
        q.index_add_(
            0, tile.places, slopes.own_slope[tile.samples] * slopes.own_cosine[tile.samples] * shard.scale
        )
    if not shard.normalized:
        return z, torch.zeros_like(q)
    return z, q * shard.inverse_norm[tile.rows] ** 2


def _add_product(shard: Shard, d_u: Tensor, g: Tensor, w: Tensor) -> None:
    if w.dtype == d_u.dtype:
        torch.addmm(d_u, g.t(), w, out=d_u)
    else:
        d_u += torch.mm(g.t(), w, out=shard.workspace.take("d_u", (g.shape[1], w.shape[1]), w))
