"""How a head is put together: its settings checked, its rows laid out in their place.

Legend: n classes of this rank, D dimension.
"""

from pathlib import Path
from typing import Any

import torch

from bigvision.ranks import Ranks
from heads.adaptive import AdaptiveMargin
from heads.forecast import HeadPlan, Neighbours, check_memory
from heads.host_rows import HostRows
from heads.idle import StepHistory
from heads.mapped_rows import MappedRows, check_room
from heads.margin import Margin
from heads.optimizers import SGD, RowOptimizer
from heads.partition import class_range
from heads.shard import Shard, accumulation_dtype, multiply_dtype
from heads.stores import STORAGE, DeviceRows, RowStore


def check_settings(
    margin: Margin | AdaptiveMargin,
    dim: int,
    scale: float,
    storage: str,
    normalized: bool,
    tile: int,
    optimizer: RowOptimizer | None,
    place: str | Path,
) -> None:
    """Raises ValueError for settings outside their range, or that don't go together."""
    if dim < 1 or tile < 1 or not scale > 0:
        raise ValueError(f"dim, tile and scale must be positive, got {dim}, {tile} and {scale}")
    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    if not normalized and margin != Margin():
        raise ValueError(f"a margin needs cosines: normalized=False takes none, got {margin}")
    if optimizer is None and place != "device":
        raise ValueError(f"an ordinary parameter lives on the device, got place={str(place)!r}")


def constructor_arguments(names: dict[str, Any]) -> dict[str, Any]:
    """The constructor's own arguments, to make another head like this one."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__", "where")}


def build_shard(
    ranks: Ranks,
    num_classes: int,
    dim: int,
    storage: str,
    rule: RowOptimizer | None,
    place: str | Path,
    host_cache: int,
    device: torch.device,
    neighbours: Neighbours,
) -> Shard:
    """This rank's rows, still zero, in their place, with the columns of the optimiser."""
    plan = HeadPlan(num_classes, dim, storage, rule, place, host_cache, ranks.size)
    if place not in ("device", "host"):
        check_room(Path(place), plan.memory().disk, ranks.rank)
    check_memory(plan, neighbours, device)
    classes, dtype = class_range(num_classes, ranks.rank, ranks.size), STORAGE[storage]
    n, shape = len(classes), (len(classes), dim)
    acc = accumulation_dtype(dtype)
    wide = ("weight", *(rule.wide if rule else ()))
    kinds = rule.narrow if rule else {}
    store: RowStore
    if place == "device":
        store = DeviceRows(wide, shape, dtype, device)
    elif place == "host":
        store = HostRows(wide, shape, dtype, device, host_cache)
    else:
        store = MappedRows(wide, shape, dtype, device, Path(place), ranks.rank, ranks.size)
    narrow = {name: torch.zeros(n, dtype=kind or acc, device=device) for name, kind in kinds.items()}
    multiply = multiply_dtype(dtype, device)
    shard = Shard(classes, store, dtype, multiply, torch.ones(n, dtype=acc, device=device), narrow)
    if isinstance(rule, SGD) and rule.dense:
        shard.history = StepHistory(rule.momentum, rule.weight_decay)
        shard.last_step = torch.zeros(n, dtype=torch.int32, device=device)
    return shard
