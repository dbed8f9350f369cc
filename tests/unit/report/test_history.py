"""The table of scores and ranks: one row a run, step and site, the same from every format, enough for the maps."""

import csv
import json
from pathlib import Path

import pandas as pd
import planted
import pytest

from peft_vit.base.errors import UserError
from peft_vit.core.records import ImportanceEntry, ProbeEntry, RankEntry, SiteInfo, history_rows
from peft_vit.lab.analysis.layers import allocations, importance_patterns
from peft_vit.lab.analysis.studies import load_studies
from peft_vit.lab.report.result_tables import export_history, history_table

pytestmark = pytest.mark.part("importance analysis")
KEPT = ("linear_probe", "lora_r8", "adalora_proportional_magnitude", "adalora_top_k_fisher")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [record for record in planted.quickstart((0, 3)) if record.spec.experiment.name in KEPT]
    smoke = planted.record(planted.experiments()[KEPT[2]], 0, 0.5, smoke=True, study="trial")
    failed = planted.failed(planted.experiments()["lora_r1"], 0, "stopped")
    return planted.write(tmp_path_factory.mktemp("results"), [*records, smoke, failed])


def test_rows_by_hand() -> None:
    sites = [
        SiteInfo(name=f"blocks.2.mlp.{matrix}", block=2, matrix=matrix, role="mlp", in_features=8, out_features=16)
        for matrix in ("fc1", "fc2")
    ]
    ranks = [
        RankEntry(step=0, budget=96, ranks={"blocks.2.mlp.fc1": 4}, unit="parameters"),
        RankEntry(step=6, budget=48, ranks={"blocks.2.mlp.fc2": 2}, unit="parameters"),
    ]
    importance = [
        ImportanceEntry(step=3, scores={"blocks.2.mlp.fc1": 1.5}),
        ImportanceEntry(step=6, scores={"blocks.2.mlp.fc1": 3.0, "blocks.2.mlp.fc2": 7.0}),
    ]
    probes = [ProbeEntry(step=6, sites=["blocks.2.mlp.fc2"], values=100)]
    rows = history_rows(sites, ranks, importance, probes)
    fixed = {"block": 2, "in_features": 8, "out_features": 16, "budget_unit": "parameters"}
    assert [{key: row[key] for key in fixed} for row in rows] == [fixed] * 6
    keys = ("step", "matrix", "score", "probed", "rank", "budget")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (0, "fc1", None, False, 4, 96),
        (0, "fc2", None, False, 0, 96),
        (3, "fc1", 1.5, False, 4, 96),
        (3, "fc2", None, False, 0, 96),  # the last ranks hold
        (6, "fc1", 3.0, False, 0, 48),
        (6, "fc2", 7.0, True, 2, 48),
    ]


def test_every_run_step_and_site_has_one_row(results: Path) -> None:
    table = pd.DataFrame(history_table(results))
    assert list(table.columns[:5]) == ["study", "smoke", "experiment", "seed", "step"]
    assert not table.duplicated(["study", "smoke", "experiment", "seed", "step", "site"]).any()
    runs = table.groupby(["study", "smoke", "experiment", "seed"]).size()
    adaptive, fixed = 72 * (1 + len(planted.UPDATES)), 72
    assert dict(runs) == {
        ("trial", True, "adalora_proportional_magnitude", 0): adaptive,
        **{("quickstart", False, "lora_r8", seed): fixed for seed in (0, 3)},
        **{("quickstart", False, name, seed): adaptive for name in KEPT[2:] for seed in (0, 3)},
    }
    lora = table[table.experiment == "lora_r8"]
    assert set(lora["rank"]) == {8}
    assert lora[["score", "budget", "budget_unit"]].isna().all(axis=None)
    adalora = table[table.experiment.isin(KEPT[2:])]
    assert adalora.score.isna().equals(adalora.step == 0)
    assert (adalora.groupby(["study", "experiment", "seed", "step"])["rank"].sum() <= 432).all()
    one_run = [row for row in history_table(results) if row["experiment"] == KEPT[3] and row["seed"] == 3]
    assert history_table(results / "quickstart" / KEPT[3] / "seed_3") == one_run


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "JSON"])
def test_each_format_reads_back_to_the_same_rows(results: Path, tmp_path: Path, ending: str) -> None:
    rows = history_table(results)
    file = tmp_path / "deep" / f"history.{ending}"
    assert export_history(results, file) == len(rows)
    if ending == "csv":
        with file.open(newline="") as handle:
            read = list(csv.DictReader(handle))
        rows = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    elif ending == "parquet":
        table = pd.read_parquet(file)
        assert str(table["rank"].dtype) == str(table["budget"].dtype) == "Int64"
        assert str(table["score"].dtype) == "float64"
        read = [
            {key: None if pd.isna(value) else value for key, value in row.items()} for row in table.to_dict("records")
        ]
    else:
        read = json.loads(file.read_text())
    assert read == rows


def test_the_maps_of_ranks_and_scores_are_in_the_table(results: Path) -> None:
    table = pd.DataFrame(history_table(results)).query("not smoke")
    (study,) = (study for study in load_studies(results) if not study.smoke)
    allocated = allocations(study)
    assert [allocation.experiment.name for allocation in allocated] == list(KEPT[2:])
    for allocation in allocated:
        own = table[table.experiment == allocation.experiment.name]
        assert own[own.step == planted.UPDATES[-1]].groupby("site")["rank"].mean().to_dict() == allocation.ranks
    for pattern in importance_patterns(study):
        own = table[(table.experiment == pattern.experiment.name) & (table.step == planted.UPDATES[-1])]
        assert own.groupby("site")["score"].mean().to_dict() == pytest.approx(pattern.raw, rel=1e-12)


@pytest.mark.parametrize(
    ("source", "file", "named"),
    [
        (".", "history.parquet", r"history\.parquet: .* pip install 'peft-vit\[parquet\]'"),
        (".", "history.xlsx", r"history\.xlsx: --output: .* \.parquet, \.json or \.csv"),
        (".", "taken.csv", r"taken\.csv: --output: is a folder"),
        ("quickstart/linear_probe/seed_0", "history.csv", "seed_0: no finished run with adapters"),
        ("missing", "history.csv", "missing: does not exist; run a study first"),
    ],
)
def test_what_keeps_a_file_from_being_written_is_one_line(
    results: Path, tmp_path: Path, without, source: str, file: str, named: str
) -> None:
    without("pyarrow")
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(UserError, match=named):
        export_history(results / source, tmp_path / file)
    assert not (tmp_path / file).is_file()
