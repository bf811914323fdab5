"""The folder of one training run: checkpoint, weights, description; every file complete or absent.

A run is identified by a fingerprint of everything that decides its result; a folder of another run is never
continued.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvision import __version__
from bigvision.models.weights import told
from bigvision.tensors import save_state, save_tensors
from tiling.lock import locked
from tiling.publish import discard, publish, staging_name

ROUTE, CHEAP_WEIGHTS, GATE_WEIGHTS = "ROUTE.toml", "cheap.safetensors", "gate.safetensors"
_CURVES = ("training.csv", "validation.csv", "curves.png", "tensorboard")
OWN_FILES = frozenset(("checkpoint.pt", "weights.safetensors", CHEAP_WEIGHTS, GATE_WEIGHTS, ROUTE, *_CURVES))
"""What a run writes besides `run.json`, which the next one replaces; --overwrite removes nothing else."""
_LOCK = ".lock"
_UNFINISHED = ".*.partial*"


@dataclass(frozen=True)
class RunFolder:
    """One run's files."""

    path: Path
    fingerprint: str

    @property
    def checkpoint(self) -> Path:
        """Everything that resuming needs."""
        return self.path / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        """The best weights so far, for `bigvision process`."""
        return self.path / "weights.safetensors"

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by `state` (tensors and plain values)."""
        complete = {**state, "fingerprint": self.fingerprint}
        _write(self.checkpoint, partial(save_state, complete))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, None before the first; ValueError where it can't be read or is another's."""
        if not self.checkpoint.is_file():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self._unusable(told(error)) from error
        if not isinstance(state, dict) or state.get("fingerprint") != self.fingerprint:
            raise self._unusable("it is not of this run")
        return state

    def _unusable(self, why: str) -> ValueError:
        return ValueError(
            f"{self.checkpoint} is no checkpoint to go on from: {why}; without it the run begins again"
        )

    def save_weights(self, state: dict[str, Tensor], name: str = "weights.safetensors") -> None:
        """Replace the weights, or the file of that name."""
        _write(self.path / name, partial(save_tensors, state))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Replace a file of the run by what `write` makes of an empty place."""
        _write(self.path / name, write)

    def describe(self, description: dict[str, Any]) -> None:
        """Write `run.json`: what was asked, and how to use the result."""
        text = json.dumps(
            {"bigvision": __version__, "fingerprint": self.fingerprint, **description}, indent=1
        )
        _write(self.path / "run.json", lambda staging: staging.write_text(text + "\n"))


@contextmanager
def open_run(folder: RunFolder, options: dict[str, Any], *, overwrite: bool = False) -> Iterator[None]:
    """Make the folder of a run, or find the one that this run began; no other process works in it meanwhile.

    options: as `describe` writes them; an error names those that differ.

    Raises:
        ValueError: something else stands there (with `overwrite`, another run is removed), it can't be
            written to, or another process trains in it.
    """
    path = folder.path
    _check_run(folder, options, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: can't be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: can't be written to")
    with locked(path / _LOCK, f"{path}: another process is training there"):
        _check_run(folder, options, overwrite)  # it may have become another's since
        own = (_found(path) or {}).get("fingerprint") == folder.fingerprint
        for entry in list(path.iterdir()):
            if entry.match(_UNFINISHED) or (not own and entry.name in OWN_FILES):
                discard(entry)
        yield


def _check_run(folder: RunFolder, options: dict[str, Any], overwrite: bool) -> None:
    """ValueError where something else than this run stands in its folder, and may not be removed."""
    found = _found(folder.path)
    if found is None or found.get("fingerprint") == folder.fingerprint:
        return
    if not found:
        raise ValueError(f"{folder.path}: holds something else than a run")
    if not overwrite:
        raise ValueError(
            f"{folder.path}: holds another run ({_difference(found, options)}); --overwrite replaces it"
        )


def _found(path: Path) -> dict[str, Any] | None:
    """The description of the run at `path`, empty for something that is no run, None for nothing."""
    if not path.exists():
        return None
    if path.is_dir() and all(entry.match(_UNFINISHED) or entry.name == _LOCK for entry in path.iterdir()):
        return None
    try:
        description = json.loads((path / "run.json").read_text())
        return description if isinstance(description["fingerprint"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _difference(found: dict[str, Any], options: dict[str, Any]) -> str:
    """In what the run that stands there was another."""
    theirs = found.get("options")
    if not isinstance(theirs, dict):
        return "of other options"
    names = [name for name in options if name != "overwrite" and theirs.get(name) != options[name]]
    told = [f"--{name.replace('_', '-')} {theirs.get(name)}, not {options[name]}" for name in names]
    return "; ".join(told) or "of other files, ranks or version"


def fingerprint_of(*facts: Any) -> str:
    """A digest of facts: anything that JSON can hold, and paths."""
    text = json.dumps([__version__, facts], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file by `write` and give it its name; OSError in a sentence, and what stood there stays."""
    staging = staging_name(path)
    try:
        write(staging)
        publish(staging, path)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        discard(staging)
