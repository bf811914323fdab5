"""Checkpoints of a training run: complete or not there.

A checkpoint is a folder `step-00000120` with the head's shards (`head/`), the backbone
(`backbone.safetensors`), its optimiser (`optimizer.safetensors`), `run.json`, and the digests of all of them.
It is written under another name, flushed to the disk, and renamed: a process killed meanwhile leaves the
older ones, and half a folder that the next save clears. The rest of a run's state is a function of (seed,
step). All ranks take part in saving and loading, on any number of them.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.integrity import damage, write_digests
from bigvision.models.embedding import BackboneSpec, save_backbone
from bigvision.models.weights import load_weights
from bigvision.tensors import save_tensors
from heads import ShardedMarginHead, load_head, save_head
from tiling.publish import flush

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


def candidates(out: Path, resume: str, *, restarted: bool = False) -> list[Path]:
    """The checkpoints that the run in `out` may go on from, best first; one that torchrun restarted goes on
    from its own last one.

    resume: none, auto or a checkpoint. Raises ValueError where another run stands in the way.
    """
    found = checkpoints(out / "checkpoints")
    if resume == "none" and found:
        raise ValueError(f"{out} holds a run up to {found[-1].name}: --resume auto, or another --out")
    if resume in ("none", "auto"):
        return found[::-1]
    chosen = Path(resume)
    read_position(chosen)
    own = chosen.resolve().parent == (out / "checkpoints").resolve()
    later = [path for path in found if path.name > chosen.name]
    if restarted and (later if own else found):
        return found[::-1]
    if found and not own:  # going on from elsewhere would mix two runs
        raise ValueError(f"{out} holds a run up to {found[-1].name}: choose another --out")
    return [chosen]


def starting_point(out: Path, resume: str, world: World) -> tuple[Path | None, list[str]]:
    """The sound checkpoint that all ranks go on from, None for a fresh start, and what is to be said of it.

    Later ones of this run are set aside under another name. Raises `FaceJobError` on every rank where a run
    stands in the way, or nothing that was asked for is sound.
    """
    with world.together("choosing a checkpoint"):
        mine = candidates(out, resume, restarted=world.restarts > 0)
    paths, told = world.gather(mine)[0], []
    for path in paths:
        if problem := damage(path, world):
            told.append(f"{path} is damaged: {problem}")
            continue
        with world.together("choosing a checkpoint"):
            if world.leads:
                told += _set_aside(out / "checkpoints", path)
        return path, told
    if paths:
        with world.together("choosing a checkpoint"):
            raise ValueError("; ".join(told))
    return None, told


def _set_aside(folder: Path, chosen: Path) -> list[str]:
    """Rename a run's checkpoints later than the chosen one; what is to be said of them."""
    if chosen.resolve().parent != folder.resolve():
        return []
    told = []
    for later in [path for path in checkpoints(folder) if path.name > chosen.name]:
        number = len(list(folder.glob(f"set-aside-*{later.name}")))
        aside = folder / f"set-aside-{number}-{later.name}"
        later.rename(aside)
        told.append(f"{later.name} is now {aside.name}: the run goes on from {chosen.name}")
    return told


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
            for path in [partial, *partial.rglob("*")]:
                flush(path)
    write_digests(partial, world)
    with world.together(f"saving {final}"):
        if world.leads:
            partial.rename(final)
            flush(folder)
            for old in checkpoints(folder)[:-keep]:
                going = folder / f"partial-{old.name}"  # half deleted, it must not look complete
                old.rename(going)
                shutil.rmtree(going)
    return final


def load(path: Path, training: Training, world: World) -> Position:
    """Load a checkpoint, of settings that agree, into a run on any number of ranks.

    Raises `FaceJobError` on every rank where it is incomplete.
    """
    with world.together(f"loading {path}"):
        position = read_position(path)
        load_weights(training.backbone, path / "backbone.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        training.optimizer.load_state_dict(_unflattened(tensors, training.optimizer.state_dict()))
        if training.scaler.is_enabled() and position.scaler:
            training.scaler.load_state_dict(position.scaler)
    with world.together(f"loading {path}"):
        load_head(training.head, path / "head")
    return position


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
