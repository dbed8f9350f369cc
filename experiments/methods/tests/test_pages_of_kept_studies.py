"""Pages of the product that show what was found say what the kept studies and the pages of the research do."""

from __future__ import annotations

import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.methods.scripts.study_evidence import RESULTS
from experiments.scripts.evidence import EXPERIMENTS, ROOT
from peft_vit.core.config import load_study

HOW_TO = ROOT / "docs" / "how_to"
FOUND = ROOT / "docs" / "what_we_found.md"
_ESTIMATE = re.compile(r"([+−]?\d+\.\d+)(?: points)?(?: better)? \[([+−]?\d+\.\d+), ([+−]?\d+\.\d+)\]")


def test_commands_on_two_studies_say_what_the_pages_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("digits", "fashion"):
        with tarfile.open(RESULTS / f"study_{folder}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        (tmp_path / f"study_{folder}").rename(tmp_path / folder)
    pages = "".join((HOW_TO / name).read_text(encoding="utf-8") for name in ("read_results.md", "choose_a_limit.md"))
    calls = re.findall(r"^peft-vit ((?:compare|recommend) (?:digits|fashion)\b.*)", pages, re.MULTILINE)
    assert len(calls) >= 2
    said = [command(*shlex.split(line)).out for line in calls]
    said += [command("compare", "digits", "fashion").out, command("recommend", "fashion", "--max-bytes", "30MB").out]
    there = {line.rstrip() for text in said for line in text.splitlines()}
    shown = "".join(re.findall(r"^```text\n(.*?)^```$", pages, re.MULTILINE | re.DOTALL)).splitlines()
    assert [line for line in shown if line not in there] == []
    assert "Over studies: test accuracy against lora_r8 (points)" in shown
    assert [line for line in shown if line.startswith("Recommended: ")]
    assert load_study(tmp_path / "chosen.yaml").name == "study_digits-recommended"


def estimates(text: str) -> set[tuple[str, str, str]]:
    return set(_ESTIMATE.findall(" ".join(text.replace("-", "−").split())))


def test_every_interval_of_what_we_found_is_copied_from_a_page_of_the_research() -> None:
    told = estimates(FOUND.read_text(encoding="utf-8"))
    there = {one for page in EXPERIMENTS.glob("**/docs/*.md") for one in estimates(page.read_text(encoding="utf-8"))}
    there |= {tuple(part.lstrip("+") for part in one) for one in there}  # type: ignore[misc] # a loss is told as a cost
    assert len(told) >= 15
    assert told - there == set()


def test_the_pages_that_what_we_found_names_are_there() -> None:
    named = re.findall(r"`(experiments/[^`]+)`", FOUND.read_text(encoding="utf-8"))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
