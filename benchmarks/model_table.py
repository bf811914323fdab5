"""Writes docs/models.md: the networks that people use, streamed against the whole image.

    python benchmarks/model_table.py                    all of them, some minutes
    python benchmarks/model_table.py Unet-resnet18      lines for these alone, on the terminal

The networks and the comparison are those of tests/streaming: float64, random weights, a scene of odd size.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "streaming"))

from forward_oracle import model_error  # noqa: E402
from gradient_oracle import compare  # noqa: E402
from networks import CLASSES, NETWORKS  # noqa: E402

from bigvision.graph import UnsupportedOperatorError  # noqa: E402
from bigvision.streaming.losses import CrossEntropy  # noqa: E402

SHAPE = (3, 101, 75)
HEADER = f"""# Networks that stream

Written by `python benchmarks/model_table.py`: each network with random weights in float64 on a scene of
{SHAPE[1]} x {SHAPE[2]} pixels, streamed 24 rows a step and run whole. *Forward* is the greatest difference of
the outputs, *backward* that of any parameter's gradient of a cross-entropy, both relative to the whole
image's.
*Passes* is how often the scene is read forward: one, and one more for each global statistic that waits for
another. MAnet's attention over all pixels of its deepest map is gathered where that has at most 8 rows, as
here; over more it is refused by name.

| network | forward | passes | backward |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Line:
    """One network's row of the table."""

    name: str
    forward: str
    passes: str = ""
    backward: str = ""

    def __str__(self) -> str:
        return f"| {self.name} | {self.forward} | {self.passes} | {self.backward} |"


def line(name: str) -> Line:
    torch.manual_seed(0)
    try:
        forward, passes = model_error(NETWORKS[name](), SHAPE, rows=24)
    except UnsupportedOperatorError as error:
        return Line(name, f"refused: {str(error).split(':')[0]}")
    return Line(name, f"{forward:.0e}", str(passes), _backward(name))


def _backward(name: str) -> str:
    height, width = SHAPE[1:]
    image_level = name.endswith("(classifier)")
    target = torch.tensor([2]) if image_level else torch.randint(0, CLASSES, (height, width))
    try:
        return f"{compare(NETWORKS[name](), SHAPE, CrossEntropy(), target, rows=24).gradient:.0e}"
    except (ValueError, RuntimeError, AssertionError) as error:
        return f"no: {str(error).splitlines()[0][:100]}"


def main() -> None:
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(line(name), flush=True)
        return
    lines = []
    for name in NETWORKS:
        start = time.perf_counter()
        lines.append(str(line(name)))
        print(f"{time.perf_counter() - start:5.1f} s {lines[-1]}", flush=True)
        (ROOT / "docs" / "models.md").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
