"""Helpers of this folder that its tests import by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def one_thread() -> None:
    """For tests that fork ranks or compute beside them."""
    import torch

    torch.set_num_threads(1)
