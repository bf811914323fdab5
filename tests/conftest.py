"""What every room's tests share."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A deadline times the machine, not the code: a first call imports and warms up, a busy machine is slow.
settings.register_profile("bigvision", deadline=None)
settings.load_profile("bigvision")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real rasters and faces that stand beside the project, or a skip that says so."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data not at hand: ../shared/data is absent")
    return folder
