"""Every number in the tables that a report writes can be computed again from the record files, to 1e-12."""

import csv
import math
from pathlib import Path

import planted
import pytest
from recomputed_tables import KEYS, NOT_COVERED, Ledger, Row, recomputation_of

from peft_vit.lab.report import ReportFiles, build_report


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = planted.quickstart((0, 1, 2), spread=0.03)
    broken = planted.failed(planted.experiments()["lora_r4"], 2, "out of memory")
    return planted.write(tmp_path_factory.mktemp("results"), [*records, broken])  # instead of the run that was done


@pytest.fixture(scope="module")
def files(results: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_vit.deploy.page.figure._saved", lambda *_, **options: b"")  # only the tables are read
        return build_report(results, tmp_path_factory.mktemp("report"), page=False)


def tables(files: ReportFiles) -> dict[str, list[dict[str, str]]]:
    return {
        file.stem.removeprefix("quickstart_"): list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        for file in (files.markdown.parent / "tables").iterdir()
    }


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def keys_of(row: dict[str, object]) -> tuple[tuple[str, str], ...]:
    def text(value: object) -> str:
        read = number(str(value))
        return str(value) if read is None else f"{read:g}"

    return tuple((key, text(row[key])) for key in KEYS if key in row)


def faults(slug: str, rows: list[dict[str, str]], expected: list[Row]) -> list[str]:
    """Return what is wrong or not computed again in a table."""
    by_keys = {keys_of(row): row for row in expected}
    wrong = []
    for row in rows:
        wanted = next((w for keys, w in by_keys.items() if set(keys) <= set(keys_of(row))), None)
        if wanted is None:
            if f"{slug}: {row.get('measure', '')}" not in NOT_COVERED:
                wrong.append(f"{slug}: no row for {keys_of(row)}")
            continue
        for column, text in row.items():
            value = number(text)
            if column not in wanted:
                if value is not None and f"{slug}: {column}" not in NOT_COVERED:
                    wrong.append(f"{slug}: {column} is not computed again: {text}")
                continue
            same = text == str(wanted[column])
            if value is not None:
                same = math.isclose(value, float(wanted[column]), rel_tol=1e-12, abs_tol=1e-12)
            if not same:
                wrong.append(f"{slug}: {column} of {keys_of(row)} is {text!r}, not {wanted[column]!r}")
    return wrong


def test_every_number_of_every_table(files: ReportFiles, results: Path) -> None:
    ledger = Ledger(results)
    wrong, numbers = [], 0
    for slug, rows in tables(files).items():
        recompute = recomputation_of(slug)
        if recompute is not None:
            numbers += sum(number(text) is not None for row in rows for text in row.values())
            wrong += faults(slug, rows, recompute(ledger, slug))
        elif slug not in NOT_COVERED:
            wrong.append(f"{slug}: no recomputation; write one in recomputed_tables.py")
    print(f"{numbers} numbers; not computed again here:", *(f"\n  {t}: {why}" for t, why in NOT_COVERED.items()))
    assert numbers > 500
    assert wrong == []
