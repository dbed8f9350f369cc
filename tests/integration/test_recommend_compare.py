"""`peft-vit recommend` and `peft-vit compare` on records on disk: what they say, write and refuse, without torch."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest

from peft_vit.analysis.across import POOL_KINDS
from peft_vit.config import load_study
from peft_vit.records import RECORD_FILE, RunRecord

EXPERIMENTS = planted.experiments()
BEST, THIRD, WORSE = "lora_r8", "qa_lora_8bit_int8_linear", "qa_lora_4bit_fp4_cosine"
HOW_TO = Path(__file__).parents[2] / "docs" / "how_to"
N_TEST = 100_000
SMALL: dict[str, Any] = {"steps": [], "sites": [], "rank_history": [], "bits_history": [], "quantization": None}


def records(study: str, n: int, *, images: str = "b", **provenance: Any) -> list[RunRecord]:
    """Return a study in which THIRD is as good as BEST and WORSE loses five points, give or take 0.8 a seed."""
    rng = np.random.default_rng([ord(study[0]), n])
    made = []
    for name, loss in ((BEST, 0.0), (THIRD, 0.0), (WORSE, 0.05)):
        noise = np.zeros(n) if name == BEST else 0.008 * rng.normal(size=n)
        for seed, value in enumerate(0.8 - loss + noise - noise.mean()):
            changes = SMALL | {
                "test": planted.metrics(float(value), N_TEST),
                "validation": planted.metrics(0.8 - loss - (0.001 if name == THIRD else 0.0), 1000),
            }
            own = {"data_sha256": images * 64, "split_sha256": images * 64, **provenance}
            made.append(
                planted.record(EXPERIMENTS[name], seed, 0.8, study=study, changes=changes, provenance_changes=own)
            )
    return made


def timed(run: str, seconds: float) -> dict[str, Any]:
    """Return what `peft-vit bench` writes of a model."""
    calls = dict.fromkeys(("median_s", "low_s", "high_s", "processor_s"), seconds)
    model = {"file": f"{run.split('/')[1]}.onnx", "format": "onnx", "bytes": 1000, "run": run}
    setting = {"threads": 1, "batch": 1, "calls": 3, "processor": "some processor", "runtime": "onnxruntime 1"}
    return {**model, **setting, **calls, "ratio": 1.0, "over": "float.onnx", "images_per_s": 1 / seconds}


def good_times(file: Path) -> Path:
    """Write times of the study `ten`: of the three experiments the best is the slowest."""
    seconds = {BEST: 0.03, THIRD: 0.01, WORSE: 0.02}
    file.write_text(json.dumps([timed(f"ten/{name}/seed_0", value) for name, value in seconds.items()]))
    return file


@pytest.fixture
def told(command: Callable[..., Any]) -> Callable[..., str]:
    return lambda *arguments: command(*arguments).out


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("ten"), records("ten", 10))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = records("other", 10, images="c", processor="another")
    return planted.write(tmp_path_factory.mktemp("other"), made)


def test_neither_command_loads_torch(ten: Path, other: Path) -> None:
    script = (
        "import sys\nfrom peft_vit.cli import main\n"
        "for arguments in (['recommend', sys.argv[1]], ['compare', *sys.argv[1:]]):\n"
        "    try:\n        main(arguments)\n    except SystemExit as done:\n        assert done.code == 0, done.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, ten, other], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Recommended: {THIRD}." in done.stdout
    assert "Over studies" in done.stdout


def test_latency_of_exported_models(ten: Path, tmp_path: Path, told) -> None:
    times = good_times(tmp_path / "bench.json")
    text = told("recommend", ten, "--max-latency-ms", "25", "--bench", times)
    assert f"Recommended: {THIRD}." in text
    assert (
        f"Latency is that of exported models in {times}, batch 1, on some processor; of each run its fastest: " in text
    )
    assert f"ten/{THIRD}/seed_0 by {THIRD}.onnx (10.0 ms, onnxruntime 1, threads: 1)" in text
    assert f"Outside the limits: {BEST}: 30 ms latency, asked at most 25 ms latency." in text


def test_equal_accuracy_at_a_third_of_the_bytes(ten: Path, tmp_path: Path, told, command) -> None:
    file = tmp_path / "chosen.yaml"
    text = told("recommend", ten, "--max-bytes", "30MB", "--output", file)
    assert f"Recommended: {THIRD}." in text
    assert "n = 10 pairs" in text
    assert "(Holm over 2 candidates)" in text
    assert f"Against {BEST} it saves 61.0 MB of 88.7 MB (69 %)" in text
    assert f"Next: peft-vit plan {file}" in text
    study = load_study(file)
    assert study.experiments == (EXPERIMENTS[THIRD],)
    assert (study.name, study.seeds) == ("ten-recommended", tuple(range(10)))
    assert told("recommend", ten, "--max-bytes", "30MB", "--output", file) == text, "the same file is no conflict"
    otherwise = command("recommend", ten, "--margin", "2", "--output", file, code=2)  # its tables come before
    assert "says something else" in otherwise.err


def test_the_configuration_is_printed_where_no_file_is_named(ten: Path, tmp_path: Path, told) -> None:
    text = told("recommend", ten)
    file = tmp_path / "printed.yaml"
    file.write_text(text[text.index(f"\n# {THIRD} of study ten") :], encoding="utf-8")
    assert load_study(file).experiments == (EXPERIMENTS[THIRD],)


def test_three_seeds_decide_nothing(tmp_path: Path, told) -> None:
    results = planted.write(tmp_path / "results", records("three", 3))
    file = tmp_path / "chosen.yaml"
    text = told("recommend", results, "--margin", "0.5", "--output", file)
    assert "Not decided: none of 2 candidates is shown to lose less than 0.5 points" in text
    assert f"The safe choice is {BEST} itself" in text
    assert "would do" in text
    assert f"{file} is not written" in text
    assert not file.exists()


def test_nothing_within_the_limits_names_what_is_nearest(ten: Path, told) -> None:
    text = told("recommend", ten, "--max-bytes", "5MB")
    assert "Nothing is within the limits, so nothing is recommended." in text
    assert f"Nearest to at most 5.0 MB: {WORSE} with 14.6 MB." in text
    assert "# " not in text


def test_below_every_adapter_fewer_ranks_than_matrices_are_named(ten: Path, tmp_path: Path, told) -> None:
    made = [one.model_copy(update={"sites": planted.sites()}) for one in records("few", 3)]
    results = planted.write(tmp_path / "results", made)
    text = told("recommend", results, "--max-params", "6k")
    assert "`lora: {ranks: {rule: stable_rank, budget: 5230, unit: parameters}}`" in text  # the head has 770
    assert "`peft-vit train IMAGES --method lora --budget 20.9kB`" in text
    named = "fewer ranks than matrices"
    assert named in told("recommend", results, "--max-params", str(770 + 1920))  # one rank of the widest
    assert named not in told("recommend", results, "--max-params", str(770 + 1919))
    assert named in told("recommend", results, "--max-params", str(770 + 82_943))
    assert named not in told("recommend", results, "--max-params", str(770 + 82_944))  # rank 1 everywhere fits
    assert named not in told("recommend", results)
    assert named not in told("recommend", results, "--max-params", "6k", "--max-bytes", "20MB")
    assert named not in told("recommend", ten, "--max-params", "6k")  # whose records name no sites


def test_bad_input_of_recommend_is_one_line(ten: Path, tmp_path: Path, refused) -> None:
    assert "--max-bytes: '5e6' is not a size above 0 with its unit" in refused("recommend", ten, "--max-bytes", "5e6")
    assert "--max-params: expected a number" in refused("recommend", ten, "--max-params", "-3")
    assert "--margin: expected points above 0" in refused("recommend", ten, "--margin", "0")
    assert "--max-seconds: expected seconds above 0" in refused("recommend", ten, "--max-seconds", "nan")
    assert "hold no latency" in refused("recommend", ten, "--max-latency-ms", "20")
    times = ten.parent / "bench.json"
    times.write_text(json.dumps([timed("other/lora_r8/seed_0", 1.0)]))
    line = refused("recommend", ten, "--max-latency-ms", "20", "--bench", times)
    assert "bench.json: --bench: holds no model of a finished run of ten: its models are of other/lora" in line
    assert "has no effect without --max-latency-ms" in refused("recommend", ten, "--bench", good_times(times))
    assert "none.json: can't be read" in refused("recommend", ten, "--max-latency-ms", "20", "--bench", "none.json")
    assert "'none' is none of its studies, which are ten" in refused("recommend", ten, "--study", "none")
    assert "does not exist" in refused("recommend", tmp_path / "nowhere")
    assert "Try --help" in refused("recommend", ten, "--smallest", "size")


def test_several_studies_are_chosen_from_by_name(tmp_path: Path, told, refused) -> None:
    both = planted.write(tmp_path, [*records("one", 2), *records("two", 10)])
    assert "holds 2 studies (one, two); choose one with --study NAME" in refused("recommend", both)
    assert "Recommended" in told("recommend", both, "--study", "two")


def test_failed_and_missing_runs_are_named(tmp_path: Path, told) -> None:
    made = [one for one in records("gaps", 10) if (one.spec.experiment.name, one.spec.seed) != (THIRD, 9)]
    failed = planted.failed(EXPERIMENTS["lora_r1"], 0, "out of memory", study="gaps")
    text = told("recommend", planted.write(tmp_path, [*made, failed]))
    assert "Failed: lora_r1, seed 0: out of memory" in text
    assert f"{THIRD} seed 9" in text
    assert "Left out: lora_r1 has no finished run." in text
    assert "n = 9 pairs" in text


def test_a_damaged_record_stops_a_decision(tmp_path: Path, refused) -> None:
    results = planted.write(tmp_path, records("torn", 3))
    next(iter(sorted(results.rglob(RECORD_FILE)))).write_text("{")
    for command in (("recommend", results), ("compare", results, results.parent)):
        assert RECORD_FILE in refused(*command)


def test_studies_are_compared_and_their_hardware_is_refused_by_name(
    ten: Path, other: Path, tmp_path: Path, told
) -> None:
    files = [tmp_path / "rows.csv", tmp_path / "rows.json"]
    for file in files:
        text = told("compare", ten, other, "--output", file)
    assert "Over studies: test accuracy against lora_r8 (points)" in text
    assert "Not pooled, seconds: timings differ: cpu on another, 2 processors, 2 threads in other" in text
    assert "Over studies: seconds" not in text
    with files[0].open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["row"] for row in json.loads(files[1].read_text(encoding="utf-8"))] == [row["row"] for row in rows]
    pooled = {row["experiment"]: row for row in rows if row["row"] == "pooled"}
    means = [
        np.mean(
            [
                one.test.accuracy
                - next(
                    two.test.accuracy
                    for two in made
                    if two.spec.experiment.name == BEST and two.spec.seed == one.spec.seed and two.test is not None
                )
                for one in made
                if one.spec.experiment.name == WORSE and one.test is not None
            ]
        )
        for made in (records("ten", 10), records("other", 10))
    ]
    assert float(pooled[WORSE]["estimate"]) == pytest.approx(np.mean(means), abs=1e-12)
    assert (pooled[WORSE]["verdict"], pooled[THIRD]["verdict"]) == ("refuted", "not decided")
    told_again = told("compare", ten, other, "--allow-mismatch", "timings")
    assert "Over studies: seconds a step" in told_again
    assert "Pooled although timings differ, as asked" in told_again


def test_bad_input_of_compare_is_one_line(ten: Path, other: Path, tmp_path: Path, refused) -> None:
    assert "is given twice" in refused("compare", ten, ten)
    assert "holds one study (ten), and it takes two" in refused("compare", ten)
    assert "holds the run 'ten/" in refused("compare", ten, ten / "ten")
    for option, value, said in (
        ("--allow-mismatch", "everything", "--allow-mismatch: 'everything' is none of"),
        ("--reference", "lora_r1", "--reference: 'lora_r1' has finished runs"),
        ("--output", tmp_path / "rows.txt", "expected a name that ends in .csv or .json"),
    ):
        assert said in refused("compare", ten, other, option, value)
    assert "Missing argument" in refused("compare")


def test_the_page_names_everything_that_pooling_checks() -> None:
    page = (HOW_TO / "compare_studies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == set(POOL_KINDS)
