"""What tests of research share with the product's tests: their helpers, and these fixtures."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (_ROOT, _ROOT / "tests"))

from tests.conftest import _old_objects_are_left_alone, _session_cache, cache  # noqa: E402
from tests.integration.conftest import command, images, run_of, weights  # noqa: E402

__all__ = ["_old_objects_are_left_alone", "_session_cache", "cache", "command", "images", "run_of", "weights"]
