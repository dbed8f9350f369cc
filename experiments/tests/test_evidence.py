"""Records join the compact tables: a study may come from several evenings, and nothing of an earlier one is lost."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import planted
import pytest

from experiments.scripts import evidence
from peft_vit.base.errors import UserError

EXPERIMENTS = planted.experiments()
LORA, OTHER = EXPERIMENTS["lora_r8"], EXPERIMENTS["lora_r1"]


def values(record: planted.RunRecord) -> dict[str, object]:
    """Add a count, which must stay whole beside runs that have none."""
    assert record.parameters is not None
    return {"adapter_parameters": record.parameters.backbone_total}


def condensed(kept: Path, folder: Path, records: list[planted.RunRecord]) -> str:
    evidence.condense(planted.write(folder, records), values, kept)
    return (kept / "quickstart.csv").read_text()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_a_second_evening_adds_its_runs_and_replaces_those_done_anew(kept: Path, tmp_path: Path) -> None:
    first = condensed(
        kept,
        tmp_path / "a",
        [planted.record(LORA, 10, 0.8), planted.record(LORA, 2, 1 / 3), planted.failed(OTHER, 2, "loss is not finite")],
    )
    second = condensed(kept, tmp_path / "b", [planted.record(OTHER, 2, 0.75), planted.record(LORA, 3, 0.7)])
    table = pd.read_csv(kept / "quickstart.csv")
    assert list(zip(table.experiment, table.seed, strict=True)) == [
        ("lora_r1", 2),
        ("lora_r8", 2),
        ("lora_r8", 3),
        ("lora_r8", 10),
    ]
    assert list(table.status) == ["done"] * 4
    assert list(table.test_accuracy.round(3)) == [0.75, 0.333, 0.7, 0.8]
    assert set(second.splitlines()) > {line for line in first.splitlines() if "lora_r8" in line}  # to the last digit
    assert f",{planted.BACKBONE_PARAMETERS}," in first.splitlines()[2]  # no 2.15e+07
    assert evidence.seeds(table) == "seeds 2, 3, 10, of which experiments have 1 to 3 so far"
    assert evidence.seeds(table[1:3]) == "seeds 2, 3"
    assert evidence.seeds(table[:1].merge(table[2:3], how="outer")) == "seeds 2, 3, 1 of them an experiment"


def test_the_same_records_again_change_nothing(kept: Path, tmp_path: Path) -> None:
    records = [planted.record(LORA, seed, 0.8 + seed / 7) for seed in range(2)]
    assert condensed(kept, tmp_path, records) == condensed(kept, tmp_path, records)


def test_tables_that_are_kept_would_survive_a_merge_as_they_are() -> None:
    for file in evidence.EXPERIMENTS.glob("*/results/*.csv"):
        text = file.read_text()
        newest = pd.read_csv(file).tail(1)
        if "experiment" not in newest:
            continue  # of no runs
        assert evidence.merge(text, newest) == text


@pytest.mark.parametrize(
    ("options", "words"),
    [({"smoke": True}, "smoke runs"), ({"provenance_changes": {"split_sha256": "f" * 64}}, "data split")],
)
def test_runs_that_do_not_belong_together_are_refused(kept: Path, tmp_path: Path, options, words: str) -> None:
    before = condensed(kept, tmp_path / "a", [planted.record(LORA, 0, 0.8)])
    with pytest.raises(UserError, match=words):
        evidence.condense(planted.write(tmp_path / "b", [planted.record(LORA, 1, 0.8, **options)]), values, kept)
    assert (kept / "quickstart.csv").read_text() == before


def test_only_what_stands_between_marks_is_made_anew() -> None:
    text = "a <!-- t --> old <!-- /t --> b <!-- u --> kept <!-- /u -->"
    assert evidence.filled(text, {"t": "new \\1"}) == (
        "a <!-- t -->\n\nnew \\1\n\n<!-- /t --> b <!-- u --> kept <!-- /u -->"
    )
