"""Results as tables: the same numbers as records and reports hold, beside what pandas makes of them."""

from pathlib import Path

import planted
import pytest
import unfinished

import peft_vit
from peft_vit.base.errors import UserError
from peft_vit.lab.report.result_tables import ResultTables

KEPT = ("linear_probe", "lora_r8", "adalora_top_k_fisher", "qa_lora_4bit_nf4_constant")
RECORDS = [r for r in planted.quickstart(tuple(range(6))) if r.spec.experiment.name in KEPT]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ResultTables:
    return peft_vit.load_results(str(planted.write(tmp_path_factory.mktemp("results"), RECORDS)))


def test_a_row_a_run(results: ResultTables) -> None:
    runs = results.runs.set_index(["experiment", "seed"])
    assert len(runs) == len(RECORDS) == 24
    assert set(runs.state) == {"done"}
    assert set(runs.study) == {"quickstart"}
    for record in RECORDS:
        row = runs.loc[record.spec.experiment.name, record.spec.seed]
        assert row.method == record.spec.experiment.method
        assert (row.test_accuracy, row.test_nll) == (record.test.accuracy, record.test.nll)
        assert (row.parameters_final, row.seconds) == (record.parameters.final, record.seconds)
        assert row.adapter_file_bytes == record.bytes.adapter_file_bytes


def test_a_row_a_site_with_its_last_rank(results: ResultTables) -> None:
    adaptive = [r for r in RECORDS if r.spec.experiment.name == "adalora_top_k_fisher"]
    ranks = results.ranks[results.ranks.experiment == "adalora_top_k_fisher"]
    assert len(ranks) == 72 * len(adaptive)
    for record in adaptive:
        own = ranks[ranks.seed == record.spec.seed].set_index("site")
        assert own["rank"].to_dict() == record.rank_history[-1].ranks
        assert own.score.to_dict() == record.importance_history[-1].scores
    assert "linear_probe" not in set(results.ranks.experiment)


def test_comparisons_are_what_pandas_finds(results: ResultTables) -> None:
    wide = results.runs.pivot(index="seed", columns="experiment", values="test_accuracy")
    compared = results.comparisons.set_index(["reference", "experiment"])
    assert sorted(set(results.comparisons.reference)) == ["linear_probe", "lora_r8"]
    for (reference, experiment), row in compared.iterrows():
        differences = (wide[experiment] - wide[reference]).round(12)
        assert row.n == len(differences) == 6
        assert row.difference == pytest.approx(differences.mean())
        assert row.difference_low < row.difference < row.difference_high
    lora = compared.loc["linear_probe", "lora_r8"]
    assert lora.p_holm >= lora.p_value
    assert lora.verdict in ("supported", "not decided")


def test_failed_runs_stay(tmp_path: Path) -> None:
    broken = planted.failed(unfinished.EXPERIMENTS["linear_probe"], 3, "out of memory")
    results = peft_vit.load_results(planted.write(tmp_path, [*unfinished.GOOD, broken]))
    assert results.runs.set_index("seed").state.to_dict() == {0: "done", 1: "done", 2: "done", 3: "failed"}
    assert results.runs.test_accuracy.isna().to_list() == [False] * 3 + [True]
    assert "out of memory" in "".join(results.notices)
    assert results.comparisons.empty
    assert results.ranks.empty
    assert "verdict" in results.comparisons.columns


def test_what_is_left_out_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"left out: .*{unfinished.BAD}") as warned:
        results = peft_vit.load_results(unfinished.results_with(tmp_path, b"[]"))
    assert [Path(warning.filename).name for warning in warned] == [Path(__file__).name]
    assert results.notices[0].startswith("quickstart: Left out: ")


def test_bad_input_is_one_line(tmp_path: Path, without) -> None:
    with pytest.raises(UserError, match="nowhere"):
        peft_vit.load_results(tmp_path / "nowhere")
    without("pandas")
    with pytest.raises(UserError, match=r"load_results needs the package pandas; .*'peft-vit\[report\]'"):
        peft_vit.load_results(tmp_path)
