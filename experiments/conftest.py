"""What tests of research share with the product's tests: their helpers, and these fixtures."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = map(str, (_TESTS.parent, _TESTS))


def _module(name: str, file: Path) -> ModuleType:
    """Load a file by its path: packages that ship a module `tests` would be found by that name before ours."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_all, _of_runs = (
    _module("tests_conftest", _TESTS / "conftest.py"),
    _module("runs_conftest", _TESTS / "integration/conftest.py"),
)
_old_objects_are_left_alone, _session_cache, cache = _all._old_objects_are_left_alone, _all._session_cache, _all.cache
command, images, run_of, weights = _of_runs.command, _of_runs.images, _of_runs.run_of, _of_runs.weights
in_this_process = _of_runs.in_this_process
