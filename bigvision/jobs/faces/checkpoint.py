"""Checkpoints of a training run: complete or not there.

A checkpoint is a folder `step-00000120` with the head's shards (`head/`), the backbone
(`backbone.safetensors`), its optimiser (`optimizer.safetensors`) and `run.json`. It is written under
another name, flushed to the disk, and renamed: a process killed meanwhile leaves the older ones, and half a
folder that the next save clears. The rest of a run's state is a function of (seed, step). All ranks take
part in saving and loading, on any number of them.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigvision.jobs.faces.agreement import World
from bigvision.models.embedding import BackboneSpec, save_backbone
from bigvision.models.weights import load_weights
from bigvision.tensors import save_tensors
from heads import ShardedMarginHead, load_head, save_head

NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int
    settings: dict[str, Any]  # what must not change between runs
    scaler: dict[str, Any]


@dataclass
class Training:
    """What is saved."""

    head: ShardedMarginHead
    backbone: nn.Module
    spec: BackboneSpec
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if NAME.fullmatch(entry.name))


def starting_point(out: Path, resume: str, *, restarted: bool = False) -> Path | None:
    """The checkpoint that the run in `out` goes on from, if any; one that torchrun restarted goes on from its
    own last one.

    resume: none, auto or a checkpoint. Raises ValueError where another run stands in the way.
    """
    found = checkpoints(out / "checkpoints")
    if resume == "none" and found:
        raise ValueError(f"{out} holds a run up to {found[-1].name}: --resume auto, or another --out")
    if resume == "none" or (resume == "auto" and not found):
        return None
    if resume == "auto":
        return found[-1]
    chosen = Path(resume)
    later = [path.name for path in found if path.name > chosen.name]
    if later and restarted:
        return found[-1]
    if later:  # going on from here would mix two runs: a restart would take the other one's
        raise ValueError(f"{out} holds later checkpoints ({', '.join(later)}): choose another --out")
    return chosen


def save(
    folder: Path, training: Training, step: int, settings: dict[str, Any], world: World, keep: int
) -> Path:
    """Save a checkpoint and drop all but the newest `keep`; `FaceJobError` on every rank if any fails."""
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{final.name}"
    with world.together(f"saving {final}"):
        if world.leads:
            for left in folder.glob("partial-*"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
    with world.together(f"saving {final}"):
        save_head(training.head, partial / "head")
    with world.together(f"saving {final}"):
        if world.leads:
            _save_backbone(partial, training, Position(step, settings, training.scaler.state_dict()))
            _flush(partial)
            partial.rename(final)
            _flush_folder(folder)
            for old in checkpoints(folder)[:-keep]:
                going = folder / f"partial-{old.name}"  # half deleted, it must not look complete
                old.rename(going)
                shutil.rmtree(going)
    return final


def load(path: Path, training: Training, settings: dict[str, Any], world: World) -> int:
    """Load a checkpoint into a run on any number of ranks and return its step.

    Raises `FaceJobError` on every rank where the checkpoint is incomplete or of other settings, naming both.
    """
    with world.together(f"loading {path}"):
        position = read_position(path)
        different = [
            f"{name} was {position.settings.get(name)!r} and is {value!r}"
            for name, value in settings.items()
            if position.settings.get(name) != value
        ]
        if different:
            raise ValueError(f"the checkpoint is of another run: {'; '.join(different)}")
        load_weights(training.backbone, path / "backbone.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        training.optimizer.load_state_dict(_unflattened(tensors, training.optimizer.state_dict()))
        if training.scaler.is_enabled():
            training.scaler.load_state_dict(position.scaler)
    with world.together(f"loading {path}"):
        load_head(training.head, path / "head")
    return position.step


def read_position(path: Path) -> Position:
    """The `run.json` of a checkpoint; raises ValueError where there is none that can be read."""
    try:
        return Position(**json.loads((path / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a training run: {error}") from error


def _save_backbone(folder: Path, training: Training, position: Position) -> None:
    save_backbone(training.backbone, training.spec, folder / "backbone.safetensors")
    save_tensors(_flattened(training.optimizer.state_dict()), folder / "optimizer.safetensors")
    (folder / "run.json").write_text(json.dumps(vars(position), indent=1))


def _flattened(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of an optimiser's state by `parameter/name`; its settings are the run's and not saved."""
    return {
        f"{number}/{name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _unflattened(tensors: dict[str, Tensor], fresh: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    return {"state": state, "param_groups": fresh["param_groups"]}


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
