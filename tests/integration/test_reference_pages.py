"""The pages of commands and of configuration keys are current, whole, and say what each option and key means."""

from __future__ import annotations

import inspect
import re

import pytest
import reference_pages
import typer

from peft_vit.cli import app
from peft_vit.config import StudyConfig


@pytest.mark.parametrize("name", reference_pages.MADE)
def test_the_page_is_current(name: str) -> None:
    made = reference_pages.MADE[name]()
    written = (reference_pages.PAGES / name).read_text(encoding="utf-8")
    assert written == made, "run: .venv/bin/python docs/scripts/reference_pages.py"


def test_every_option_of_every_command_stands_there() -> None:
    sections = re.split(r"^## (.+)\n", reference_pages.commands(), flags=re.MULTILINE)[1:]
    told = dict(zip(sections[::2], sections[1::2], strict=True))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert told.keys() == commands.keys()
    for name, command in commands.items():
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        asked = {option for option in options if option.startswith("--")} - {"--help"}
        assert asked <= set(re.findall(r"`(--[a-z-]+)`", told[name])), name


def test_a_command_that_may_exit_with_1_says_when() -> None:
    ways = re.compile(r"typer\.Exit\(1\)|_sum_up\(")
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        if ways.search(inspect.getsource(command.callback)):
            assert re.search(r"Exit codes:.* 1 ", " ".join(command.help.split())), command.name


def test_every_key_and_option_has_a_meaning() -> None:
    for page in (reference_pages.commands(), reference_pages.configuration()):
        rows = re.findall(r"^\| (`.+) \| (.+) \| (.+) \| (.*) \|$", page, flags=re.MULTILINE)
        assert len(rows) > 80
        assert [row for row in rows if len(row[3].strip()) < 3] == []


def test_a_section_is_found_by_its_last_name() -> None:
    """Two sections of one name would make one anchor of two, and links lead to the first."""
    titles = re.findall(r"^##+ `?([^`\n]+)`?$", reference_pages.configuration(), flags=re.MULTILINE)
    assert len(set(titles)) == len(titles)
    assert set(StudyConfig.model_fields) & set(titles) == {
        "backbone", "data", "measures", "execution", "experiments", "stopping"
    }  # fmt: skip
