"""Networks that several of these tests route to can be imported by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
