"""Published tables and verdicts stay as they are, to the digit: each is computed again from the kept records."""

from __future__ import annotations

import pytest

from experiments.methods.scripts.kept_tables import STUDIES, kept_tables, tables_of


@pytest.fixture(scope="module")
def kept() -> dict[str, dict[str, str]]:
    return kept_tables()


@pytest.mark.parametrize("study", STUDIES)
def test_every_table_of_a_kept_study_comes_out_as_it_was(study: str, kept: dict[str, dict[str, str]]) -> None:
    made = tables_of(study)
    assert len(made) >= 7
    assert made.keys() == kept[study].keys()
    for name, text in made.items():
        assert text.splitlines() == kept[study][name].splitlines(), f"{study}: {name}"
