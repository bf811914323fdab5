"""Every example of docs/streaming-training.md runs and prints what the page says."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_oracle import compare
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "streaming-training.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```\n(?P<output>.*?)^```)?", re.M | re.S)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's examples leave, run from top to bottom."""
    names: dict[str, Any] = {}
    examples = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))
    assert len(examples) == 3
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example["code"], PAGE.name, "exec"), names)
        assert printed.getvalue() == example["output"]
    return names


def test_the_users_loss_has_exact_gradients(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    target = torch.randint(0, 2, (26, 11))
    assert compare(network, (3, 26, 11), page["Tversky"](), target, rows=2).gradient < 1e-9
