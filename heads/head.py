"""The class-sharded margin head: softmax over millions of classes whose centres are spread over the ranks.

Legend: b samples of this rank, B of all ranks, D dimension, C classes, n classes of this rank.
    x feature, w centre, u = x/|x|, v = w/|w|, c = u.v, t = c at the label
    loss = mean over valid samples of log(exp(s*psi(t)) + sum over other classes exp(s*c)) - s*psi(t)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heads import kernels
from heads.collectives import GatheredBatch, Ranks, gather_batch
from heads.counter import STREAM_ROUNDING, normal_rows, row_keys
from heads.margin import AdaptiveMargin, Margin, TargetLogit, target_logit
from heads.optimizers import SGD
from heads.partition import class_range
from heads.shard import ActiveRows, Shard, Slopes, Workspace, denominators, own_cosines, walk_back
from heads.stores import DeviceRows, Rows

_STORAGE = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Pass:
    """What forward leaves for backward: a few B-sized vectors and the gathered batch."""

    batch: GatheredBatch
    norms: Tensor
    unit: Tensor
    u: Tensor
    own_rows: Tensor
    active: ActiveRows
    own_cosine: Tensor
    target: TargetLogit
    lse: Tensor
    valid: Tensor
    version: int


class ShardedMarginHead(nn.Module):
    """Exact class-sharded margin softmax whose optimiser step happens inside backward."""

    def __init__(
        self,
        num_classes: int,
        dim: int,
        margin: Margin | AdaptiveMargin | None = None,
        scale: float = 64.0,
        *,
        storage: str = "float32",
        optimizer: SGD,
        seed: int = 0,
        tile: int = 4096,
        init_std: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.ranks = Ranks.current()
        self.num_classes, self.dim, self.scale, self.seed = num_classes, dim, scale, seed
        self.margin = Margin() if margin is None else margin
        self.optimizer = optimizer
        self.lr = optimizer.lr
        self.step = 0
        classes = class_range(num_classes, self.ranks.rank, self.ranks.size)
        dtype, where = _STORAGE[storage], torch.device(device)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        store = DeviceRows(("weight", *optimizer.wide), (len(classes), dim), dtype, where)
        inverse = torch.empty(len(classes), dtype=acc, device=where)
        self.shard = Shard(classes, store, inverse, scale, True, tile, Workspace())
        self._anchor = torch.zeros((), requires_grad=True, device=where)
        self._version = 0
        self._narrow: dict[str, Tensor] = {}
        for low in range(0, len(classes), tile):
            rows = slice(low, min(low + tile, len(classes)))
            ids = torch.arange(rows.start, rows.stop, device=where) + classes.start
            values = store.load(rows, ("weight",))
            values["weight"].copy_(normal_rows(seed, ids, dim, init_std, dtype))
            store.store(rows, values)
            inverse[rows] = kernels.inverse_norms(values["weight"], acc)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over all ranks' samples. features [b, D] floating, labels int64 [b], -1 is ignored."""
        return _ShardedSoftmax.apply(features, self._anchor, labels, self)

    def full_centers(self) -> Tensor:
        """All centres [C, D] in class order, on every rank."""
        own = self.shard.store.whole("weight")
        chunk = -(-self.num_classes // self.ranks.size)
        padded = own.new_zeros(chunk, self.dim)
        padded[: len(own)] = own
        return torch.cat(self.ranks.gather(padded))[: self.num_classes]

    def _run_forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, _Pass]:
        shard, acc = self.shard, self.shard.acc
        batch = gather_batch(self.ranks, features, labels, self.dim, self.num_classes)
        x = batch.features.to(acc)
        norms = x.norm(dim=1)
        unit = x / norms.clamp_min(1e-12)[:, None]
        u = unit.to(shard.store.whole("weight").dtype)
        own = shard.own_rows(batch.labels)
        active = ActiveRows()
        sums = torch.stack([denominators(shard, active, u, own, 0.0), own_cosines(shard, unit, own).double()])
        others, cosine = self.ranks.sum_(sums)
        cosine = cosine.to(acc)
        m = self.margin
        target = target_logit(cosine, m.m1, m.m2, m.m3)
        own_logit = self.scale * target.psi.double()
        lse = torch.logaddexp(torch.log(others), own_logit)
        valid = batch.labels >= 0
        losses = torch.where(valid, lse - own_logit, 0.0)
        loss = losses.sum() / valid.sum().clamp_min(1)
        done = _Pass(batch, norms, unit, u, own, active, cosine, target, lse.to(acc), valid, self._version)
        return loss.to(acc), done

    def _run_backward(self, done: _Pass, grad: Tensor) -> Tensor:
        if done.version != self._version:
            raise RuntimeError("the centres have moved since this loss was computed")
        shard = self.shard
        count = done.valid.sum().clamp_min(1)
        coefficient = torch.where(done.valid, grad.to(shard.acc) / count, 0.0)
        p = torch.exp(self.scale * done.target.psi - done.lse)
        own_slope = coefficient * (p - 1.0) * done.target.d_cosine
        slopes = Slopes(done.lse, coefficient, own_slope, done.own_cosine)
        d_u = self.ranks.sum_(walk_back(shard, done.active, done.u, done.own_rows, slopes, self._update))
        self._version += 1
        self.step += 1
        d_u = d_u[done.batch.mine]
        unit, norms = done.unit[done.batch.mine], done.norms[done.batch.mine]
        d_x = (d_u - (d_u * unit).sum(1, keepdim=True) * unit) / norms.clamp_min(1e-12)[:, None]
        return d_x * self.ranks.size

    def _update(self, rows: Rows, columns: dict[str, Tensor], d_w: Tensor, projection: Tensor) -> None:
        keys = {}
        if d_w.dtype == torch.bfloat16:
            local = (
                torch.arange(rows.start, rows.stop, device=d_w.device) if isinstance(rows, slice) else rows
            )
            key, _ = row_keys(self.seed, STREAM_ROUNDING, self.step, local + self.shard.classes.start)
            keys = {name: key for name in columns}
        lr = torch.tensor(self.lr, dtype=self.shard.acc, device=d_w.device)
        narrow = {name: column[rows] for name, column in self._narrow.items()}
        _, inverse = kernels.update_tile_(self.optimizer, columns, narrow, d_w, projection, lr, keys)
        self.shard.inverse_norm[rows] = inverse


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, anchor: Tensor, labels: Tensor, head: ShardedMarginHead
    ) -> Tensor:
        loss, ctx.done = head._run_forward(features.detach(), labels)
        ctx.head, ctx.dtype = head, features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.head._run_backward(ctx.done, grads[0]).to(ctx.dtype), None, None, None
