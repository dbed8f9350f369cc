"""The word list of the documents finds what it is for; `make check` reads the documents."""

from __future__ import annotations

import prose
import pytest

EVERYWHERE = prose.WORDS | prose.PRINTED_AND_PAGES


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("Runs are kept.\nThe ledger goes.", 2, "ledger"),
        ("It is written anew.", 1, "anew"),
        ("Nor can it\nbe had.", 1, "nor can it"),
    ],
)
def test_a_word_is_named_with_its_line(text: str, line: int, words: str) -> None:
    assert (line, words) in [(at, found) for at, found, _ in prose.faults(text, EVERYWHERE)]


def test_code_and_targets_of_links_are_left_out() -> None:
    text = "```\nledger anew\n```\n\nSee `site_rank` and `site`, [here](site.md).\n\n    peft-vit sites\n"
    assert list(prose.faults(text, EVERYWHERE)) == []
    assert [found for _, found, _ in prose.faults("`site`", EVERYWHERE, prose.DATA)] == ["site"]
