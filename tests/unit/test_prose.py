"""The word list of the documents finds what it is for, and the documents keep to it."""

from __future__ import annotations

from pathlib import Path

import prose
import pytest

EVERYWHERE = prose.WORDS | prose.PRINTED_AND_PAGES


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("Runs are kept.\nThe ledger goes.", 2, "ledger"),
        ("It is written anew.", 1, "anew"),
        ("A Site, or two sites.", 1, "site"),
        ("The same command goes on.", 1, "goes on"),
        ("Training stops to gain.", 1, "stops to gain"),
        ("It is no image.", 1, "is no image"),
        ("Nor can it\nbe had.", 1, "nor can it"),
        ("Five draws of labels.", 1, "five draws"),
        ("The formula stands in a file.", 1, "stands"),
    ],
)
def test_a_word_is_named_with_its_line(text: str, line: int, words: str) -> None:
    assert (line, words) in [(at, found) for at, found, _ in prose.faults(text, EVERYWHERE)]


@pytest.mark.parametrize(
    "text", ["There is no image.", "It is no longer here.", "A star stands for all.", "It tells you."]
)
def test_plain_english_has_no_fault(text: str) -> None:
    assert list(prose.faults(text, EVERYWHERE)) == []


def test_code_and_targets_of_links_are_left_out() -> None:
    text = "```\nledger anew\n```\n\nSee `site_rank` and `site`, [here](site.md).\n\n    peft-vit sites\n"
    assert list(prose.faults(text, EVERYWHERE)) == []
    assert [found for _, found, _ in prose.faults("`site`", EVERYWHERE, prose.DATA)] == ["site"]


def test_messages_and_public_docstrings_are_read_private_ones_and_keys_not(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""What a module says."""\n\n\n'
        'def shown(name: str) -> str:\n    """What a person\n    reads."""\n'
        '    return {"one_key": f"a {name} goes on"}\n\n\n'
        'def _hidden() -> None:\n    """What nobody reads."""\n'
    )
    read = sorted(prose.texts(file))
    assert [(line, name) for line, _, name in read] == [(1, ""), (5, "shown"), (7, None)]
    assert read[2][1].split() == ["a", "{}", "goes", "on"]


def test_proselint_reads_pages_without_their_code() -> None:
    text = "# Models\n\nIt is `very unique`.\n\nThis model is very unique.\n"
    assert {line for line, _ in prose.style(text)} == {5}
    assert list(prose.style("Two `very` small models.\n")) == []


def test_documents_and_what_the_program_prints_keep_to_it() -> None:
    assert list(prose.lines()) == []
