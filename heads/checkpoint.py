"""Checkpoints of a sharded head with `torch.distributed.checkpoint`: saved on some ranks, loaded on any
number.

A checkpoint is a folder: one safetensors file a rank with its DTensor shards (centres, moments, narrow
columns, what the gate keeps for each class) and `head.json` with the settings and the step. It is written
under another name, flushed and renamed, so a folder of the final name is complete, and the one it replaces
stays until then.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bigvision.ranks import Ranks
from heads.head import ShardedMarginHead
from heads.safetensors_storage import StreamedReader, StreamedWriter
from heads.state import position, resume, row_tensors, settle, shared_tensors

_FILE = "head.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint could not be written or read, or is of another head. Raised on every rank."""


def save_head(head: ShardedMarginHead, folder: Path | str) -> None:
    """Saves the head with its optimiser, gate and step as `folder`. Called on every rank together.

    Raises CheckpointError on every rank if any of them fails (a full disk, say); a checkpoint that was there
    before is then still there.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    ranks = head.ranks
    with _together(ranks, f"saving {folder}"):
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    settle(head)
    with _together(ranks, f"saving {folder}"), _quiet():
        dcp.save(_state(head), storage_writer=StreamedWriter(partial), no_dist=ranks.size == 1)
    with _together(ranks, f"saving {folder}"):
        if ranks.rank == 0:
            _write_json(partial / _FILE, _settings(head) | position(head))
            _replace(partial, folder)


def load_head(head: ShardedMarginHead, folder: Path | str) -> None:
    """Puts a checkpoint into a head of the same settings, on any number of ranks. Called on every rank
    together.

    Raises CheckpointError on every rank where the folder is no complete checkpoint, or one of other settings
    (classes, dimension, margin, scale, storage, optimiser, gate, seed), naming both.
    """
    folder, ranks = Path(folder), head.ranks
    with _together(ranks, f"loading {folder}"):
        found = _read_json(folder / _FILE)
        wanted = _settings(head)
        other = [
            f"{k} is {found.get(k)!r} there and {v!r} here" for k, v in wanted.items() if found.get(k) != v
        ]
        if other:
            raise ValueError(f"a checkpoint of another head: {'; '.join(other)}")
    with _together(ranks, f"loading {folder}"), _quiet():
        dcp.load(_state(head), storage_reader=StreamedReader(folder), no_dist=ranks.size == 1)
    with _together(ranks, f"loading {folder}"):
        resume(head, found)


def _state(head: ShardedMarginHead) -> dict[str, Any]:
    """Live tensors by name; those with a row a class as DTensors."""
    rows = row_tensors(head)
    state: dict[str, Any] = dict(rows)
    if head.ranks.size > 1:
        # Of the tensor's own device: a mesh of another one would make each DTensor a copy of its rows.
        meshes = {kind: _mesh(head.ranks, kind) for kind in sorted({t.device.type for t in rows.values()})}
        state = {k: _shard(v, head.num_classes, meshes[v.device.type]) for k, v in rows.items()}
    buffers = {f"module.{name}": buffer for name, buffer in head.named_buffers()}
    # Scalars are saved as vectors of one: a shard has rows.
    return state | shared_tensors(head) | {k: v.view(-1) if v.ndim == 0 else v for k, v in buffers.items()}


def _mesh(ranks: Ranks, kind: str) -> DeviceMesh:
    return init_device_mesh(kind, (ranks.size,))


def _shard(local: Tensor, num_classes: int, mesh: DeviceMesh) -> Tensor:
    shape = torch.Size((num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _settings(head: ShardedMarginHead) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit."""
    return {
        "format": _FORMAT,
        "num_classes": head.num_classes,
        "dim": head.dim,
        "margin": repr(head.margin),
        "scale": head.scale,
        "normalized": head.shard.normalized,
        "storage": str(head.shard.dtype).removeprefix("torch."),
        "optimizer": type(head.rule).__name__,
        "columns": [*head.shard.store.names, *head.shard.narrow],
        "dense": head.shard.history is not None,
        "gate": repr(head.active),
        "seed": head.seed,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _together(ranks: Ranks, what: str) -> Iterator[None]:
    """An error on any rank is a CheckpointError on all of them."""
    try:
        with ranks.together(what):
            try:
                yield
            except dcp.CheckpointException as error:  # a collective failure: the first rank's own error
                rank, (cause, _) = next(iter(error.failures.items()))
                raise OSError(f"rank {rank}: {type(cause).__name__}: {cause}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no complete checkpoint of a head: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"no checkpoint of a head: {path} holds no table of settings")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _replace(partial: Path, folder: Path) -> None:
    """Gives `partial` its final name; what had it goes only then."""
    _flush_folder(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
