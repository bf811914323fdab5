"""Every example of docs/gating.md runs and prints what the page says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from page_examples import run_section, sections

PAGE = "gating.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Hundreds of tiny steps: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("title", sections(PAGE))
def test_examples_print_what_the_page_says(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_section(PAGE, title)


def test_the_page_covers_the_taxonomy() -> None:
    titles = " / ".join(sections(PAGE))
    for kind in ("Learnable", "Not learnable", "Hard and soft", "k = 1", "Instance", "Space", "Time"):
        assert kind in titles
    for kind in ("Depth", "Width", "Routing between branches", "Dynamic parameters"):
        assert kind in titles
