"""`from healing import ...` in the tests of this folder, and the oracles of the conversions."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "structure")]
