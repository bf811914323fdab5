"""Networks that several of these tests route to can be imported by name."""

import sys
from pathlib import Path

import pytest

from bigvision.routing import MixedResolution

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def mixed() -> MixedResolution:
    """See `mixed_layers.py`."""
    from mixed_layers import mixed_layers

    return mixed_layers()
