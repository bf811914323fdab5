"""The examples of docs/routing.md that show what they print do print it."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"
BLOCK = re.compile(r"^```python\n(?P<code>[^`]*)^```\n\n```text\n(?P<output>.*?)^```", re.M | re.S)
EXAMPLES = [(match["code"], match["output"]) for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_examples_print_what_the_page_says(code: str, output: str) -> None:
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, PAGE.name, "exec"), names)
    assert printed.getvalue() == output


def test_the_page_has_examples() -> None:
    assert EXAMPLES
