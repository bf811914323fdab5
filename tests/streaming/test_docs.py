"""Every example of docs/streaming-training.md runs and prints what the page says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_oracle import compare
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "streaming-training.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```\n(?P<output>.*?)^```)?", re.M | re.S)
EXAMPLES = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))


def test_the_examples_print_what_the_page_says() -> None:
    """In a process of its own, as a reader's: the memory of the budget is the whole process's."""
    assert len(EXAMPLES) == 3
    code = "".join(example["code"] for example in EXAMPLES)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "".join(example["output"] for example in EXAMPLES)


def test_the_users_loss_has_exact_gradients() -> None:
    names: dict[str, Any] = {"torch": torch}
    (loss,) = [example["code"] for example in EXAMPLES if "class Tversky" in example["code"]]
    exec(compile(loss.partition("\nwater = ")[0], PAGE.name, "exec"), names)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    target = torch.randint(0, 2, (26, 11))
    assert compare(network, (3, 26, 11), names["Tversky"](), target, rows=2).gradient < 1e-9
