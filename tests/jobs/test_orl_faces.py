"""Real faces: trained on 24 people, verified on 16 others."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_strangers_are_told_apart(shared_data: Path, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "orl_faces.py"
    spec = importlib.util.spec_from_file_location("orl_faces", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(shared_data / "faces" / "orl", tmp_path / "run") >= 0.90
