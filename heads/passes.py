"""One training step of the sharded softmax: what is gathered, summed and handed from forward to backward.

Legend: b samples of this rank, B of all ranks, D dimension.
    x feature, w centre, u = x/|x|, v = w/|w|, c = u.v, t = c at the label, psi(t) the margin
    LSE = log(exp(s*psi) + sum over the other classes exp(s*c))
    loss = mean over the valid samples of LSE - s*psi + the penalty of an adaptive margin
Across ranks go: features and labels (B x D), the own cosines and the sums of exponentials (B each; once
more B for the shift where logits have no bound), one scalar, and the gradient of u (B x D). Nothing of size
C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision.ranks import Ranks
from heads.adaptive import AdaptiveMargin, Value, run_margin
from heads.collectives import GatheredBatch
from heads.gates import ActiveGate, GateInput
from heads.margin import Margin, TargetLogit, plain_logit, target_logit
from heads.shard import ActiveRows, Shard, Slopes, Update, denominators, needs_shift, own_products, walk_back

_TINY = 1e-12  # features shorter than this count as if they were this long


@dataclass(frozen=True)
class Features:
    """The gathered samples: norms acc [B], unit acc [B, D], and u, the same in the GEMMs' dtype.

    Without normalisation unit and u are the features themselves.
    """

    norms: Tensor
    unit: Tensor
    u: Tensor


@dataclass(frozen=True)
class TargetMargin:
    """psi and its slopes; of adaptive margins also (m1, m2, m3, penalty) with their graph from the norms."""

    logit: TargetLogit
    penalty: Value = 0.0
    norms: Tensor | None = None
    adaptive: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Pass:
    """What forward leaves for backward: a few B-sized vectors, the gathered batch and the active rows."""

    batch: GatheredBatch
    features: Features
    own_rows: Tensor
    active: ActiveRows
    own_cosine: Tensor
    target: TargetMargin
    lse: Tensor
    valid: Tensor
    moment: tuple[int, ...]


def prepare(shard: Shard, x: Tensor) -> Features:
    """Norms and units of gathered features [B, D]."""
    x = x.to(shard.acc)
    norms = x.norm(dim=1)
    unit = x / norms.clamp_min(_TINY)[:, None] if shard.normalized else x
    return Features(norms, unit, unit.to(shard.multiply))


def forward_pass(
    shard: Shard,
    ranks: Ranks,
    margin: Margin | AdaptiveMargin,
    gate: ActiveGate | None,
    batch: GatheredBatch,
    step: int,
    moment: tuple[int, ...],
) -> tuple[Tensor, Pass]:
    """The global mean loss (an acc scalar; 0 where no sample is valid) and what backward needs."""
    features = prepare(shard, batch.features)
    own_rows = shard.own_rows(batch.labels)
    given = GateInput(features.unit, batch.labels, own_rows, step)
    active = select(gate, given)
    others, own_cosine = log_sums(shard, ranks, active, features, own_rows)
    valid = batch.labels >= 0
    target = apply_margin(shard, margin, own_cosine, features.norms, valid)
    own_logit = shard.scale * target.logit.psi.double()
    lse = torch.logaddexp(others, own_logit)
    if gate is not None:
        more = gate.widen(given, active, lse)
        if more is not None:
            further, _ = log_sums(shard, ranks, more, features, torch.full_like(own_rows, -1))
            lse, active = torch.logaddexp(lse, further), merge(active, more)
        gate.certify(given, lse)
    loss = torch.where(valid, lse - own_logit + target.penalty, 0.0).sum() / valid.sum().clamp_min(1)
    done = Pass(batch, features, own_rows, active, own_cosine, target, lse, valid, moment)
    return loss.to(shard.acc), done


def select(gate: ActiveGate | None, given: GateInput) -> ActiveRows:
    """The gate's choice, checked: a class of the batch that isn't active can't be learnt."""
    if gate is None:
        return ActiveRows()
    active = gate.select(given)
    if active.rows is not None:
        own = given.own_rows[given.own_rows >= 0]
        # Rows are sorted: those up to each own class are one more than those before it, if it is there.
        up_to = torch.searchsorted(active.rows, own, right=True)
        missing = own[up_to == torch.searchsorted(active.rows, own)]
        if len(missing):
            raise RuntimeError(f"the gate left out row {int(missing[0])}, the class of a sample of the batch")
    return active


def log_sums(
    shard: Shard, ranks: Ranks, active: ActiveRows, features: Features, own_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Log of the sum over all ranks' active classes but the own one, float64 [B]; own cosine acc [B]."""
    shift, total = denominators(shard, active, features.u, own_rows)
    if needs_shift(shard, active):
        highest = ranks.max_(shift.clone())
        total = torch.where(total > 0, total * torch.exp(shift - highest), 0.0)
        shift = highest
    sums = torch.stack([total, own_products(shard, features.unit, own_rows).double()])
    total, own_cosine = ranks.sum_(sums)
    return torch.where(total > 0, shift + torch.log(total), -torch.inf), own_cosine.to(shard.acc)


def apply_margin(
    shard: Shard, margin: Margin | AdaptiveMargin, own_cosine: Tensor, norms: Tensor, valid: Tensor
) -> TargetMargin:
    """psi of each sample; an adaptive margin is run with gradients, so that backward can go through it."""
    if not shard.normalized:
        return TargetMargin(plain_logit(own_cosine))
    if isinstance(margin, Margin):
        return TargetMargin(target_logit(own_cosine, margin.m1, margin.m2, margin.m3))
    with torch.enable_grad():
        leaf = norms.detach().requires_grad_()
        found = run_margin(margin, leaf[valid])
        adaptive = tuple(_spread(value, valid) for value in found)
    m1, m2, m3, penalty = (m.detach() if isinstance(m, Tensor) else float(m) for m in adaptive)
    return TargetMargin(target_logit(own_cosine, m1, m2, m3), penalty, leaf, adaptive)


def _spread(value: Value, valid: Tensor) -> Value:
    """Values of the valid samples in the places of all, [V] -> [B]; the others' are of no account."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.new_zeros(len(valid)).masked_scatter(valid, value)


def merge(first: ActiveRows, more: ActiveRows) -> ActiveRows:
    """The union of two disjoint sets of rows, sorted."""
    if first.rows is None or more.rows is None:
        return first
    rows, order = torch.cat([first.rows, more.rows]).sort()
    if first.log_weight is None or more.log_weight is None:
        return ActiveRows(rows)
    weights = torch.cat([first.log_weight, more.log_weight])[order]
    return ActiveRows(rows, weights, max(first.heaviest, more.heaviest))


def backward_pass(shard: Shard, ranks: Ranks, done: Pass, grad: Tensor, update: Update | None) -> Tensor:
    """d loss/d features of this rank's samples times the number of ranks, acc [b, D]; `update` gets the
    tiles.

    DDP divides the sum of the ranks' gradients by their number: so multiplied, a backbone under DDP
    receives the gradient of the global mean.
    """
    count = done.valid.sum().clamp_min(1)
    coefficient = torch.where(done.valid, grad.to(shard.acc) / count, 0.0)
    lse = done.lse.to(shard.acc)
    log_p = shard.scale * done.target.logit.psi.double() - done.lse
    d_psi = coefficient * torch.expm1(log_p).to(shard.acc)
    slopes = Slopes(lse, coefficient, d_psi * done.target.logit.d_cosine, done.own_cosine)
    d_u = ranks.sum_(walk_back(shard, done.active, done.features.u, done.own_rows, slopes, update))
    mine = done.batch.mine
    d_x = d_u[mine]
    if shard.normalized:
        unit, norms = done.features.unit[mine], done.features.norms[mine].clamp_min(_TINY)
        d_x = (d_x - (d_x * unit).sum(1, keepdim=True) * unit) / norms[:, None]
        d_norm = _norm_gradient(done.target, shard.scale * d_psi, coefficient)
        if d_norm is not None:
            d_x = d_x + d_norm[mine, None] * unit
    return d_x * ranks.size


def _norm_gradient(target: TargetMargin, d_psi: Tensor, d_penalty: Tensor) -> Tensor | None:
    """dL/d|x| acc [B] through adaptive margins, or None where they don't differentiate."""
    if target.norms is None:
        return None
    logit = target.logit
    gradients = (d_psi * logit.d_m1, d_psi * logit.d_m2, d_psi * logit.d_m3, d_penalty)
    pairs = [
        (m, g.to(m.dtype) if m.ndim else g.sum().to(m.dtype))
        for m, g in zip(target.adaptive, gradients, strict=True)
        if isinstance(m, Tensor) and m.requires_grad
    ]
    if not pairs:
        return None
    outputs, grads = zip(*pairs, strict=True)
    (d_norm,) = torch.autograd.grad(outputs, target.norms, grads)
    return d_norm
