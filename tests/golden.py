"""Golden documents: what a person reads in one scenario, kept whole below tests/golden/ and reviewed as text.

`GOLDEN=write make test` writes them again; read the difference before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check_golden(name: str, text: str) -> None:
    """Hold a text against the file of this name, or write that file where GOLDEN=write."""
    file = FOLDER / name
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    expected = file.read_text(encoding="utf-8") if file.is_file() else ""
    assert text.splitlines() == expected.splitlines(), f"{file}: GOLDEN=write writes what is said now"
