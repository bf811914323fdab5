"""Class centres from a file into a sharded head: each rank reads its own rows, a tile at a time.

Legend: C classes, D dimension.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from heads import ShardedMarginHead


def take_centres(head: ShardedMarginHead, path: Path) -> None:
    """Put the `weight` [C, D] of a safetensors file into a fresh head, as `bigvision face convert` writes it.

    Raises ValueError where the file is unreadable or of another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            rows = file.get_slice("weight")
            shape = tuple(rows.get_shape())
            if shape != (head.num_classes, head.dim):
                raise ValueError(f"centres {path} are {shape}, the head's ({head.num_classes}, {head.dim})")
            shard = head.shard
            for low in range(0, len(shard.classes), shard.tile):
                high = min(low + shard.tile, len(shard.classes))
                part = rows[shard.classes.start + low : shard.classes.start + high]
                shard.store.store(slice(low, high), {"weight": part.to(shard.device, shard.dtype)})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"centres {path} cannot be read: {error}") from error
    with torch.no_grad():
        head.refresh_norms()
        if head.active is not None:  # clusters and codes are those of the centres
            head.gate = head.active.build(head.shard, head.ranks, head.seed)
