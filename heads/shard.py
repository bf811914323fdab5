"""One rank's classes, walked tile by tile: the denominator forward, gradients and fused update backward.

Legend: n classes of this shard, A active ones, K of a tile, B gathered samples, D dimension.
acc is float64 where the centres are float64, else float32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor

from bigvision.hardware import has_fast_bfloat16
from heads import kernels
from heads.counter import STREAM_CATCH_UP, row_keys
from heads.idle import StepHistory, bring_up
from heads.kernel_choice import Kernels
from heads.partition import ClassRange
from heads.stores import Rows, RowStore


@dataclass(frozen=True)
class ActiveRows:
    """The classes that take part in a step: rows int64 [A] of this shard, sorted, or None for all of them.

    log_weight acc [A] is added to their logits (log(1/r) for a class kept with probability r), or None for 0;
    none is above `heaviest`, the same number on every rank.
    """

    rows: Tensor | None = None
    log_weight: Tensor | None = None
    heaviest: float = 0.0


@dataclass(frozen=True)
class Tile:
    """Active classes [low, high) of the walk: their rows, and which samples [m] own a class (its place [m])
    in it.
    """

    low: int
    high: int
    rows: Rows
    samples: Tensor
    places: Tensor


class Workspace:
    """Buffers that outlive a tile and a step: fresh memory is faulted in page by page, which costs more than
    the work.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialised [rows, columns] tensor of the dtype and device of `like`."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get(name)
        kind = (like.dtype, like.device)
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != kind:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


@dataclass
class Shard:
    """A rank's centres with everything the walk needs.

    multiply is the dtype that GEMMs run in: float32 for bfloat16 centres where the processor only emulates
    bfloat16. inverse_norm acc [n] is 1/|w|, kept true as rows move. narrow holds the optimiser's columns [n].
    history and last_step (int32 [n]) are there where idle rows follow a dense optimiser.
    """

    classes: ClassRange
    store: RowStore
    dtype: torch.dtype
    multiply: torch.dtype
    inverse_norm: Tensor
    narrow: dict[str, Tensor]
    scale: float = 64.0
    normalized: bool = True
    tile: int = 4096
    seed: int = 0
    kernels: Kernels = field(default_factory=Kernels)
    history: StepHistory | None = None
    last_step: Tensor | None = None
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def acc(self) -> torch.dtype:
        """The dtype of sums: float64 for float64 centres, else float32."""
        return self.inverse_norm.dtype

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.inverse_norm.device

    def row_tiles(self) -> Iterator[slice]:
        """All rows, tile by tile."""
        for low in range(0, len(self.classes), self.tile):
            yield slice(low, min(low + self.tile, len(self.classes)))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Works on another device, or with centres of another dtype, from now on."""
        self.store.to(device)
        self.dtype, self.multiply = dtype, multiply_dtype(dtype, device)
        self.inverse_norm = self.inverse_norm.to(device, accumulation_dtype(dtype))
        self.narrow = {name: column.to(device) for name, column in self.narrow.items()}
        if self.last_step is not None:
            self.last_step = self.last_step.to(device)

    def ids(self, rows: Rows) -> Tensor:
        """Global class ids of rows, int64 [K]."""
        if isinstance(rows, slice):
            return torch.arange(rows.start, rows.stop, device=self.device) + self.classes.start
        return rows + self.classes.start

    def own_rows(self, labels: Tensor) -> Tensor:
        """The row of each label here, -1 where another shard has it or the sample is ignored. int64 [B]."""
        here = (labels >= self.classes.start) & (labels < self.classes.stop)
        return torch.where(here, labels - self.classes.start, -1)

    def rounding_keys(self, stream: int, step: int, rows: Rows) -> tuple[Tensor, ...]:
        """The keys of stochastic rounding, two int32 [K], where the centres are bfloat16; else none."""
        return row_keys(self.seed, stream, step, self.ids(rows)) if self.dtype == torch.bfloat16 else ()

    def load(self, rows: Rows, names: Sequence[str] = ("weight",)) -> tuple[dict[str, Tensor], Tensor]:
        """Columns [K, D] of some rows as of now, and their 1/|w| acc [K]. Valid until the next load."""
        if self.history is None or self.last_step is None:
            return self.store.load(rows, names), self.inverse_norm[rows]
        last = self.last_step[rows]
        if not len(last) or int(last.min()) == len(self.history):
            return self.store.load(rows, names), self.inverse_norm[rows]
        return self._load_idle(self.history, last, rows, names)

    def _load_idle(
        self, history: StepHistory, last: Tensor, rows: Rows, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        columns = self.store.load(rows, [n for n in ("weight", "momentum") if n in self.store.names])
        momentum = columns.get("momentum")
        w, m = bring_up(
            history, last, columns["weight"].to(self.acc), None if momentum is None else momentum.to(self.acc)
        )
        keys = self.rounding_keys(STREAM_CATCH_UP, len(history), rows)
        stale = (last < len(history))[:, None]
        fresh = {"weight": torch.where(stale, kernels.rounded(w, keys, 0).to(self.dtype), columns["weight"])}
        if m is not None and momentum is not None:
            fresh["momentum"] = torch.where(stale, kernels.rounded(m, keys, 1).to(self.dtype), momentum)
        return {n: fresh[n] for n in names}, kernels.inverse_norms(fresh["weight"], self.acc)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over centres of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products with centres of `dtype`."""
    emulated = dtype == torch.bfloat16 and not has_fast_bfloat16(device)
    return torch.float32 if emulated else dtype


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


def row_scale(shard: Shard, inverse_norm: Tensor) -> Tensor:
    """What a raw product w.u is multiplied by to be a logit: scale/|w|, or scale. acc [K]."""
    return inverse_norm * shard.scale if shard.normalized else torch.full_like(inverse_norm, shard.scale)


def operand(shard: Shard, w: Tensor) -> Tensor:
    """Centres [K, D] as GEMMs take them; valid until the next tile's."""
    if w.dtype == shard.multiply:
        return w
    wide = w.new_empty(0, dtype=shard.multiply)
    return shard.workspace.take("w", (len(w), w.shape[1]), wide).copy_(w)


def tile_products(shard: Shard, tile: Tile, w: Tensor, u: Tensor) -> Tensor:
    """w.u of a tile, [K, B] in the operands' dtype, with each sample's own class masked."""
    z = shard.workspace.take("z", (len(w), len(u)), w)
    torch.mm(w, u.t(), out=z)
    if len(tile.samples):
        z[tile.places, tile.samples] = kernels.MASKED
    return z


def own_products(shard: Shard, unit: Tensor, own_rows: Tensor) -> Tensor:
    """Each sample's cosine (or product) with its own class, from unit acc [B, D]: acc [B], 0 if held
    elsewhere.
    """
    held = own_rows >= 0
    out = torch.zeros(len(unit), dtype=shard.acc, device=unit.device)
    rows, inverse = own_rows[held].unique(return_inverse=True)
    if len(rows):
        columns, inverse_norm = shard.load(rows)
        w = columns["weight"].to(shard.acc)
        out[held] = ((w * inverse_norm[:, None] if shard.normalized else w)[inverse] * unit[held]).sum(1)
    return out


def denominators(shard: Shard, active: ActiveRows, u: Tensor, own_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, total), float64 [B] each: exp(shift)*total is the sum over the active classes but the own one
    of exp(logit + log_weight).

    Cosine logits are bounded by the scale, so where exp(scale) times the classes of a tile fits the number
    format the shift is 0 and each tile is read once; otherwise the largest logit so far is carried along.
    """
    total = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    shifted = needs_shift(shard, active)
    shift = torch.full_like(total, -torch.inf if shifted else 0.0)
    for tile in tiles(shard, active, own_rows):
        columns, inverse_norm = shard.load(tile.rows)
        z = tile_products(shard, tile, operand(shard, columns["weight"]), u)
        factor = row_scale(shard, inverse_norm)
        offset = log_weights(active, tile, factor)
        if not shifted:
            total += shard.kernels.sum_exp(z, factor, offset)
            continue
        largest, part = shard.kernels.max_sum_exp(z, factor, offset)
        higher = torch.maximum(shift, largest.double())
        total = total * torch.exp(shift - higher) + part.double() * torch.exp(largest.double() - higher)
        shift = higher
    return shift, total


def needs_shift(shard: Shard, active: ActiveRows) -> bool:
    """Whether a sum of exp(logit) can leave its number format: of a tile the accumulation dtype's (float32
    ends at exp(88.7)), of all tiles and ranks float64's (exp(709)). With room for a rounded logit.
    """
    highest = shard.scale + active.heaviest
    of_tile = highest + log(min(shard.tile, shard.classes.num_classes))
    of_all = highest + log(shard.classes.num_classes)
    return not shard.normalized or of_all > 690.0 or (shard.acc == torch.float32 and of_tile > 80.0)


def log_weights(active: ActiveRows, tile: Tile, like: Tensor) -> Tensor:
    """The log-weights of a tile, acc [K]."""
    return torch.zeros_like(like) if active.log_weight is None else active.log_weight[tile.low : tile.high]


@dataclass(frozen=True)
class Slopes:
    """What backward knows of each sample, acc [B]: the log of its denominator, its weight in the loss, and of
    its own class the slope dL/dlogit and the cosine."""

    lse: Tensor
    coefficient: Tensor
    own_slope: Tensor
    own_cosine: Tensor


@dataclass(frozen=True)
class TileGradient:
    """dL/dw is products - projection*w: [K, D] in the GEMMs' dtype, and acc [K]."""

    products: Tensor
    projection: Tensor


Update = Callable[[Rows, dict[str, Tensor], TileGradient], None]


def walk_back(
    shard: Shard, active: ActiveRows, u: Tensor, own_rows: Tensor, slopes: Slopes, update: Update | None
) -> Tensor:
    """Gradient of the loss by u from this shard's classes, acc [B, D]; `update` gets each tile on the way.

    A class's gradient is complete inside its tile: dL/dw = g u - (q/|w|^2) w, with g [K, B] the slopes over
    the norms and q = sum_b dL/dc * c.
    """
    d_u = torch.zeros(len(u), u.shape[1], dtype=shard.acc, device=u.device)
    names = shard.store.names if update else ("weight",)
    for tile in tiles(shard, active, own_rows):
        columns, inverse_norm = shard.load(tile.rows, names)
        w = operand(shard, columns["weight"])
        g, projection = _tile_slopes(shard, active, tile, w, inverse_norm, u, slopes)
        _add_product(shard, d_u, g, w)
        if update is not None:
            d_w = torch.mm(g, u, out=shard.workspace.take("d_w", (len(w), u.shape[1]), w))
            update(tile.rows, columns, TileGradient(d_w, projection))
    return d_u


def _tile_slopes(
    shard: Shard, active: ActiveRows, tile: Tile, w: Tensor, inverse_norm: Tensor, u: Tensor, slopes: Slopes
) -> tuple[Tensor, Tensor]:
    """The slopes [K, B] over the norms, in the GEMMs' dtype, and q/|w|^2 acc [K]."""
    z = tile_products(shard, tile, w, u)
    factor = row_scale(shard, inverse_norm)
    log_weight = log_weights(active, tile, factor)
    q = shard.kernels.softmax_gradient_(z, factor, log_weight, slopes.lse, slopes.coefficient)
    if len(tile.samples):
        slope = slopes.own_slope[tile.samples]
        z[tile.places, tile.samples] = (slope * factor[tile.places]).to(z.dtype)
        q.index_add_(0, tile.places, slope * slopes.own_cosine[tile.samples] * shard.scale)
    return z, q * inverse_norm**2 if shard.normalized else torch.zeros_like(q)


def _add_product(shard: Shard, d_u: Tensor, g: Tensor, w: Tensor) -> None:
    if w.dtype == d_u.dtype:
        torch.addmm(d_u, g.t(), w, out=d_u)
    else:
        d_u += torch.mm(g.t(), w, out=shard.workspace.take("d_u", (g.shape[1], w.shape[1]), w))
