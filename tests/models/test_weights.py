"""Files that are no weights: the sentence says why, without torch's advice to trust them."""

import re
from pathlib import Path

import pytest
import torch

from bigvision.models.weights import read_state


class Calls:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": Calls()}, path)
    with pytest.raises(ValueError) as raised:
        read_state(path)
    assert str(raised.value).startswith(f"weights {path} are neither safetensors")
    assert re.search(r": it needs .(builtins\.)?print., and only tensors are loaded$", str(raised.value))
    assert capsys.readouterr().out == ""


def test_text_is_no_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("hello, not a pickle")
    with pytest.raises(ValueError, match=r"weights\.pth are neither") as raised:
        read_state(path)
    assert "trust" not in str(raised.value) and "\x1b" not in str(raised.value)
