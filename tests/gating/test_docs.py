"""Every example of docs/gating.md runs and prints what the page says."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "gating.md"
BLOCK = re.compile(
    r"^## (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?", re.M | re.S
)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The (code, output) pairs of each section; names live on within a section."""
    found: dict[str, list[tuple[str, str]]] = {}
    title = ""
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if match["title"]:
            title = match["title"]
        else:
            found.setdefault(title, []).append((match["code"], match["output"] or ""))
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Hundreds of tiny steps: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("title", sections())
def test_examples_print_what_the_page_says(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for code, expected in sections()[title]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
        assert printed.getvalue() == expected


def test_the_page_covers_the_taxonomy() -> None:
    titles = " / ".join(sections())
    for kind in ("Learnable", "Not learnable", "Hard and soft", "k = 1", "Instance", "Space", "Time"):
        assert kind in titles
    for kind in ("Depth", "Width", "Routing between branches", "Dynamic parameters"):
        assert kind in titles
