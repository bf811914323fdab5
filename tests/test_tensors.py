"""Files of tensors: permissions as any new file has them, the system's own errors, nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bigvision.tensors import save_state, save_tensors

Save = Callable[[Mapping[str, Any], Path], None]

FULL = """
import pathlib, resource, signal, sys, torch
import bigvision.tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    save = getattr(bigvision.tensors, sys.argv[1])
    save({"a": torch.zeros(10000), "b": torch.zeros(9)}, pathlib.Path(sys.argv[2]))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("save", [save_tensors, save_state])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_a_file_has_the_mode_that_umask_leaves(tmp_path: Path, save: Save, mask: int) -> None:
    before = os.umask(mask)
    try:
        save({"a": torch.arange(3)}, tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("save", ["save_tensors", "save_state"])
@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_full_disk_is_told_as_the_system_does(tmp_path: Path, save: str, limit: int) -> None:
    path = tmp_path / "file"
    command = [sys.executable, "-c", FULL, save, str(path), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"[Errno 27] File too large: '{path}'\n", run.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"file"}  # of torch.save, which begins it


def test_a_failed_write_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    save_tensors({"a": torch.arange(3)}, tmp_path / "file")
    monkeypatch.setattr("bigvision.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(3)}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.arange(3))


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".file.partial"
    left.mkdir()
    (left / ".tmpS0u1JR").write_bytes(b"half")
    save_tensors({"a": torch.arange(3)}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tied_and_transposed_tensors_and_a_description_are_kept(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"a": weight, "tied": weight, "part": weight[1:], "turned": weight.t(), "none": torch.zeros(0)}
    save_tensors(tensors, tmp_path / "file", {"kind": "test"})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"kind": "test"}
