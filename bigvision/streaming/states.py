"""The states kept for the way back: a stack whose lower part, used last, lies in a scratch folder.

A state is the line buffers between two steps. On disk it is one file of raw bytes; the folder is removed with
the stack, whatever happens.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bigvision.streaming.checkpoints import BudgetError, Scratch
from bigvision.streaming.scan import Lines


@dataclass(frozen=True)
class _Spilled:
    """Where in a file each line buffer lies: (offset, dtype, shape, whether channels come last)."""

    path: Path
    parts: dict[fx.Node, tuple[int, torch.dtype, tuple[int, ...], bool]]
    device: torch.device


class StateStack:
    """States by step, the latest on top.

    Args:
        on_disk: how many of the lowest states (0, which is empty, aside) go to the scratch folder.
        scratch: that folder and its byte limit.
    """

    def __init__(self, on_disk: int, scratch: Scratch | None) -> None:
        self._on_disk = on_disk
        self._scratch = scratch
        self._folder: Path | None = None
        self._states: list[tuple[int, Lines | _Spilled]] = []
        self._bytes = 0

    def __enter__(self) -> StateStack:
        if self._on_disk:
            assert self._scratch is not None
            self._scratch.folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="states-", dir=self._scratch.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def top(self) -> int:
        """The step before which the top state was."""
        return self._states[-1][0]

    def push(self, step: int, lines: Lines) -> None:
        """Keep the state before `step`, a copy that holds nothing else alive."""
        spill = 1 <= len(self._states) <= self._on_disk
        self._states.append((step, self._write(step, lines) if spill else compact(lines)))

    def read(self) -> Lines:
        """The top state."""
        state = self._states[-1][1]
        return _load(state) if isinstance(state, _Spilled) else state

    def pop(self) -> None:
        """Drop the top state."""
        state = self._states.pop()[1]
        if isinstance(state, _Spilled):
            self._bytes -= state.path.stat().st_size
            state.path.unlink()

    def _write(self, step: int, lines: Lines) -> _Spilled:
        assert self._folder is not None
        assert self._scratch is not None
        size = sum(line.numel() * line.element_size() for line in lines.values())
        if self._bytes + size > self._scratch.limit:
            raise BudgetError(
                f"the states in {self._scratch.folder} would take {self._bytes + size} bytes, "
                f"the limit is {self._scratch.limit}",
                self._bytes + size,
            )
        parts: dict[fx.Node, Any] = {}
        path = self._folder / f"{step:06d}.state"
        with path.open("wb") as file:
            for node, line in lines.items():
                last = _channels_last(line)
                parts[node] = (file.tell(), line.dtype, tuple(line.shape), last)
                flat = (line.movedim(1, -1) if last else line).contiguous()
                file.write(flat.cpu().view(torch.uint8).numpy().data)
        self._bytes += size
        device = next((line.device for line in lines.values()), torch.device("cpu"))
        return _Spilled(path, parts, device)


def compact(lines: Lines) -> Lines:
    """Copies in their own memory: a line buffer is otherwise a view of all that its step made."""
    return {node: line.clone(memory_format=torch.preserve_format) for node, line in lines.items()}


def _channels_last(line: Tensor) -> bool:
    return line.ndim == 4 and line.is_contiguous(memory_format=torch.channels_last)


def _load(state: _Spilled) -> Lines:
    lines: Lines = {}
    with state.path.open("rb") as file:
        for node, (offset, dtype, shape, last) in state.parts.items():
            stored = (shape[0], *shape[2:], shape[1]) if last else shape
            size = int(np.prod(shape)) * dtype.itemsize
            file.seek(offset)
            data = torch.from_numpy(np.fromfile(file, np.uint8, size))
            line = data.view(dtype).reshape(stored)
            lines[node] = (line.movedim(-1, 1) if last else line).to(state.device)
    return lines
