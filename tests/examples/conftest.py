"""The examples import their neighbours, as scripts do; tests import them and the helpers of this folder."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
