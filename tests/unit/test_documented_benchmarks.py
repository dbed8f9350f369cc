"""A paragraph or table that names a kept benchmark states no ratio and no megabytes which that file does not hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FILE = re.compile(r"benchmarks/results/(\w+)\.json")
_RATIO = re.compile(r"(?<![\d.,])\d\.\d\d(?![\d.,]\d|\d| %)")
_MEGABYTES = re.compile(r"(?<![\d.,])[\d,]{3,5}(?= MB)")


def _values(content: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _values(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield key, content


def _held(content: Any) -> set[str]:
    """Return all ratios of a file with two digits, and its bytes in whole megabytes."""
    ratios = {f"{value:.2f}" for key, value in _values(content) if "ratio" in key or key.startswith("over")}
    return ratios | {f"{value / 1e6:,.0f}" for key, value in _values(content) if key.endswith("bytes")}


def _paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs; a table that follows one belongs to it."""
    parts = re.split(r"\n\s*\n", text)
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        yield part + (f"\n{following}" if following.lstrip().startswith("|") else "")


def _not_held(text: str) -> list[str]:
    wrong = []
    for paragraph in _paragraphs(text):
        if names := set(_FILE.findall(paragraph)):
            held = set().union(*(_held(json.loads((ROOT / f"benchmarks/results/{n}.json").read_text())) for n in names))
            stated = {*_RATIO.findall(paragraph), *_MEGABYTES.findall(paragraph)}
            wrong += [f"{number} ({', '.join(sorted(names))})" for number in sorted(stated - held)]
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_ratios_and_megabytes_are_those_of_the_kept_file(document: Path) -> None:
    assert not _not_held(document.read_text(encoding="utf-8"))


KEPT = (ROOT / "benchmarks").glob("results/*.json")


@pytest.mark.parametrize("file", sorted(KEPT), ids=lambda path: path.stem)
def test_a_kept_file_names_commit_and_processor(file: Path) -> None:
    machine = json.loads(file.read_text())["machine"]
    assert machine["processor"]
    assert re.fullmatch("[0-9a-f]{12}( and changes)?", machine["commit"])
    assert machine["instructions"]


def test_readme_has_the_table_of_few_labels() -> None:
    import few_labels

    table = list(few_labels.readme(few_labels.rows_of(few_labels.RESULTS)))
    assert len(table) > 5
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8"), "benchmarks/few_labels.py --readme"


def test_the_table_of_a_cluster_is_what_its_arithmetic_gives() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "cluster_arithmetic.py"], check=True, capture_output=True)
