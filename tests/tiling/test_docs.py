"""The examples of docs/tiling.md run and print what the page says."""

import doctest
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tiling.md"


def test_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").replace("```python\n", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, "tiling.md", str(PAGE), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    result = runner.run(example, out=said.append)
    assert result.attempted > 40 and not result.failed, "".join(said)
