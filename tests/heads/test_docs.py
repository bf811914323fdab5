"""Every example of docs/heads.md prints, for any reader, what the page says."""

from pathlib import Path

import pytest
from page_examples import run_section, sections

PAGE = "heads.md"


@pytest.mark.parametrize("title", sections(PAGE))
def test_examples_print_what_the_page_says(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_section(PAGE, title)
