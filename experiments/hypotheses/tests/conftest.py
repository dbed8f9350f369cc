"""Tests of research use the helpers of the product's tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3] / name) for name in ("", "tests")]
