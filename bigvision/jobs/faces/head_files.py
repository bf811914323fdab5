"""Temporary: whole centres from rank 0."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def _columns(head: Any) -> dict[str, torch.Tensor]:
    shard = head.shard
    return (
        {n: shard.store.whole(n) for n in shard.store.names}
        | dict(shard.narrow)
        | {"inverse_norm": shard.inverse_norm}
    )


def save_head(head: Any, folder: Path) -> None:
    out = {}
    for name, own in _columns(head).items():
        chunk = -(-head.num_classes // head.ranks.size)
        padded = own.new_zeros(chunk, *own.shape[1:])
        padded[: len(own)] = own.detach()
        out[name] = torch.cat(head.ranks.gather(padded))[: head.num_classes]
    out["step"] = torch.tensor(head.step)
    if head.ranks.rank == 0:
        folder.mkdir()
        save_file(out, folder / "head.safetensors")


def load_head(head: Any, folder: Path) -> None:
    found = load_file(folder / "head.safetensors")
    c = head.shard.classes
    for name, own in _columns(head).items():
        own.data.copy_(found[name][c.start : c.stop])
    head.step = int(found["step"])
