"""Identities that join, leave or turn out to be one person, between runs.

Each returns a new head, of any place or gate, whose rows keep their centre and their optimiser's state
under new class ids. All ranks call together; rows travel in blocks, so no rank ever holds more than its
shard and one block.

Legend: C classes before, N after, D dimension.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heads.head import ShardedMarginHead

_BLOCK = 1 << 15


def add_identities(head: ShardedMarginHead, count: int, **settings: Any) -> ShardedMarginHead:
    """A head with `count` more classes after the old ones, freshly initialised. See `remap_identities`."""
    if count < 0:
        raise ValueError(f"can't add {count} identities")
    return remap_identities(head, torch.arange(head.num_classes), head.num_classes + count, **settings)


def remove_identities(head: ShardedMarginHead, ids: Sequence[int], **settings: Any) -> ShardedMarginHead:
    """A head without the classes `ids`; the others close ranks in order. See `remap_identities`."""
    _check_ids(head, ids)
    keep = torch.ones(head.num_classes, dtype=torch.bool)
    keep[list(ids)] = False
    target = torch.where(keep, keep.cumsum(0) - 1, -1)
    return remap_identities(head, target, int(keep.sum()), **settings)


def merge_identities(
    head: ShardedMarginHead, groups: Sequence[Sequence[int]], **settings: Any
) -> ShardedMarginHead:
    """A head where each group of classes is one, in the place of its lowest id; the others close ranks in
    order.

    The new centre and moments are the means of the old ones. See `remap_identities`.
    """
    flat = [i for group in groups for i in group]
    _check_ids(head, flat)
    if len(set(flat)) != len(flat):
        raise ValueError("a class can be merged into one group only")
    keeper = torch.arange(head.num_classes)
    for group in groups:
        keeper[list(group)] = min(group)
    kept = keeper == torch.arange(head.num_classes)
    return remap_identities(head, (kept.cumsum(0) - 1)[keeper], int(kept.sum()), **settings)


@torch.no_grad()
def remap_identities(
    head: ShardedMarginHead, target: Tensor, num_classes: int, **settings: Any
) -> ShardedMarginHead:
    """A head of `num_classes` classes where old class c has become target[c].

    Args:
        head: the old head; it stays as it is.
        target: int64 [C], the new id of each old class, or -1 for those that leave. Several with the same
        id are
            averaged; ids that no old class takes start afresh.
        num_classes: N.
        settings: of the constructor, where they are to differ. The seed is one higher unless given, so that
        new
            classes don't start where old ones did; memory-mapped heads must name another `place`.

    Raises:
        ValueError: a target of another length or outside [-1, N), or a place that is in use.
    """
    if target.shape != (head.num_classes,) or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 [{head.num_classes}], got {target.dtype} {list(target.shape)}"
        )
    if int(target.min()) < -1 or int(target.max()) >= num_classes:
        raise ValueError(
            f"targets {int(target.min())} to {int(target.max())} are outside [-1, {num_classes})"
        )
    old = head.settings
    if old["place"] not in ("device", "host") and settings.get("place", old["place"]) == old["place"]:
        raise ValueError(f"{old['place']} holds the old head's rows: name another place for the new one")
    now = {
        "num_classes": num_classes,
        "seed": head.seed + 1,
        "device": head.shard.device,
        "storage": str(head.shard.dtype).removeprefix("torch."),
    }
    fresh = ShardedMarginHead(**(old | now | settings))
    for low, high, sums, counts in _blocks(head, target, num_classes):
        _take(fresh, low, high, sums, counts)
    if (
        isinstance(fresh.margin, nn.Module)
        and isinstance(head.margin, nn.Module)
        and "margin" not in settings
    ):
        fresh.margin.load_state_dict(head.margin.state_dict())
    fresh.step = head.step
    if fresh.optimizer is not None and head.optimizer is not None:
        fresh.lr = head.lr
    fresh.refresh_norms()
    if fresh.gate is not None:
        fresh.gate.rebuild()
    return fresh


def _check_ids(head: ShardedMarginHead, ids: Sequence[int]) -> None:
    wrong = [i for i in ids if not 0 <= i < head.num_classes]
    if wrong:
        raise ValueError(f"class {wrong[0]} is outside [0, {head.num_classes})")


def _blocks(
    head: ShardedMarginHead, target: Tensor, num_classes: int
) -> Iterator[tuple[int, int, dict[str, Tensor], Tensor]]:
    """(low, high, sums of old rows by column, their number) of new ids [low, high), equal on every rank."""
    shard = head.shard
    local = target[shard.classes.start : shard.classes.stop].to(shard.device)
    order = local.argsort(stable=True)
    ranked = local[order].contiguous()
    for low in range(0, num_classes, _BLOCK):
        high = min(low + _BLOCK, num_classes)
        first, last = torch.searchsorted(ranked, torch.tensor([low, high], device=shard.device)).tolist()
        rows, place = order[first:last].sort()
        where = ranked[first:last][place] - low
        counts = torch.zeros(high - low, dtype=torch.float64, device=shard.device)
        counts.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
        columns: dict[str, Tensor] = {}
        if shard.store.names:
            columns |= shard.load(rows, shard.store.names)[0]
        columns |= {name: column[rows] for name, column in shard.narrow.items()}
        sums = {}
        for name, column in columns.items():
            total = torch.zeros((high - low, *column.shape[1:]), dtype=torch.float64, device=shard.device)
            sums[name] = head.ranks.sum_(total.index_add_(0, where, column.detach().double()))
        yield low, high, sums, head.ranks.sum_(counts)


def _take(fresh: ShardedMarginHead, low: int, high: int, sums: dict[str, Tensor], counts: Tensor) -> None:
    """Puts the means into the rows of this rank; ids without an old class keep their fresh start."""
    shard = fresh.shard
    first, last = max(low, shard.classes.start), min(high, shard.classes.stop)
    if first >= last:
        return
    part = slice(first - low, last - low)
    taken = counts[part] > 0
    rows = (torch.arange(first, last, device=shard.device) - shard.classes.start)[taken]
    for name, total in sums.items():
        values = total[part][taken]
        mean = values / counts[part][taken].view(-1, *[1] * (values.ndim - 1))
        if name in shard.store.names:
            shard.store.store(rows, {name: mean.to(shard.dtype)})
        elif name in shard.narrow:
            shard.narrow[name][rows] = mean.to(shard.narrow[name].dtype)
