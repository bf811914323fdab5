"""The examples of a page of docs/: its Python blocks, run section by section, print what the page says."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(
    r"^## (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```\n(?:\n?```(?:text)?\n(?P<output>.*?)^```)?",
    re.M | re.S,
)


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """The (code, output) pairs of each section; names live on within a section."""
    found: dict[str, list[tuple[str, str]]] = {}
    title = "introduction"
    for match in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        if match["title"]:
            title = match["title"]
        else:
            found.setdefault(title, []).append((match["code"], match["output"] or ""))
    return found


def run_section(page: str, title: str) -> None:
    """Run a section in the current folder, as a reader does that starts there, and compare what it prints."""
    names: dict[str, Any] = {}
    torch.seed()  # a reader's generator is in no known state: what a page prints, it has seeded
    for code, expected in sections(page)[title]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page}: {title}", "exec"), names)
        assert printed.getvalue() == expected
