"""`peft-vit recommend` and `peft-vit compare` on records on disk: what they say, write and refuse, without torch."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from golden import check_golden

from peft_vit.core.config import load_study
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis.across import POOL_KINDS
from peft_vit.runs.records.storage import RECORD_FILE

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


def good_times(file: Path) -> Path:
    """Write times of the study `ten`: of the three experiments the best is the slowest."""
    return write_times(file, {f"ten/{BEST}/seed_0": 0.03, f"ten/{THIRD}/seed_0": 0.01, f"ten/{WORSE}/seed_0": 0.02})


def write_times(file: Path, seconds: dict[str, float]) -> Path:
    file.write_text(json.dumps([planted.bench_row(run, value).model_dump() for run, value in seconds.items()]))
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


def test_what_is_recommended_and_compared_is_told(ten, other, tmp_path, told, monkeypatch) -> None:
    """One document of all outcomes: shown, nothing within, not decided, below every adapter, gaps, and two studies."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    made = [record for record in records("gaps", 10) if (record.spec.experiment.name, record.spec.seed) != (THIRD, 9)]
    made.append(planted.failed(EXPERIMENTS["lora_r1"], 0, "out of memory", study="gaps"))
    planted.write(Path("gaps"), made)
    planted.write(Path("three"), records("three", 3))
    good_times(Path("bench.json"))
    planted.write(Path("third"), records("third", 10, images="d", packages={"torch": "1", "timm": "1.0.31"}))
    for name, folder in (("ten", ten), ("other", other)):
        Path(name).symlink_to(folder)
    asked = (
        "recommend ten --max-bytes 30MB --output chosen.yaml",
        "recommend ten",
        "recommend ten --max-latency 25ms --bench bench.json --output timed.yaml",
        "recommend ten --max-bytes 5MB",
        "recommend three --margin 0.5 --output none.yaml",
        "recommend gaps --output gaps.yaml",
        "compare ten other --output rows.csv",
        "compare ten third --output refused.csv",
        "compare ten third --allow-mismatch versions --output rows.json",
    )
    said = "\n".join(f"$ peft-vit {line}\n{told(*line.split())}" for line in asked)
    check_golden("recommend_and_compare.txt", "\n".join(map(str.rstrip, said.splitlines())) + "\n")
    assert not Path("none.yaml").exists()
    assert "Its configuration: chosen.yaml" in told(*asked[0].split()), "the same file is no conflict"
    study = load_study(Path("chosen.yaml"))
    assert study.experiments == (EXPERIMENTS[THIRD],)
    assert (study.name, study.seeds) == ("ten-recommended", tuple(range(10)))
    text = told("recommend", "ten")
    Path("printed.yaml").write_text(text[text.index(f"\n# {THIRD} of study ten") :], encoding="utf-8")
    assert load_study(Path("printed.yaml")).experiments == (EXPERIMENTS[THIRD],)
    with Path("rows.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    pooled = {row["experiment"]: row for row in rows if row["study"] == "ten; other"}
    assert (pooled[WORSE]["verdict"], pooled[THIRD]["verdict"]) == ("refuted", "not decided")
    assert float(pooled[WORSE]["difference"]) == pytest.approx(-0.05, abs=1e-5)  # planted in both studies
    in_json = json.loads(Path("rows.json").read_text(encoding="utf-8"))
    assert [row["experiment"] for row in in_json if row["study"] == "ten; third"] == [WORSE, THIRD]
    assert "ten; third" not in Path("refused.csv").read_text(encoding="utf-8")


REFUSED: dict[str, str] = {  # what is asked -> what is named; other limits: test_recommendation.py
    "recommend ten --max-bytes 5e6": "--max-bytes: ",
    "recommend ten --max-latency 20ms --bench foreign.json": "foreign.json: --bench: ",
    "recommend ten --bench good.json": "--bench: has no effect",
    "recommend ten --max-latency 20ms --bench none.json": "none.json: ",
    "recommend ten --study none": "--study: 'none'",
    "recommend nowhere": "does not exist",
    "recommend ten --smallest size": "--smallest",
    "recommend ten --margin 2 --output other.yaml": "other.yaml: exists and holds something else",
    "recommend both": "holds 2 studies (one, two); choose one with --study NAME",
    "recommend torn": RECORD_FILE,
    "compare torn ten": RECORD_FILE,
    "compare ten ten": "holds the run 'ten/",
    "compare ten": "holds one study (ten)",
    "compare ten ten/ten": "holds the run 'ten/",
    "compare ten other --allow-mismatch everything": "--allow-mismatch: ",
    "compare ten other --output rows.txt": ".csv or .json",
    "compare ten other --output good.json": "good.json: --output: exists already; give another name, or --overwrite",
    "compare": "is missing",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_bad_input_is_named(asked: str, ten: Path, other: Path, tmp_path: Path, command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("ten", ten), ("other", other)):
        Path(name).symlink_to(folder)
    good_times(Path("good.json"))
    write_times(Path("foreign.json"), {"other/lora_r8/seed_0": 1.0})
    Path("other.yaml").touch()
    planted.write(Path("both"), [*records("one", 2), *records("two", 2)])
    sorted(planted.write(Path("torn"), records("torn", 2)).rglob(RECORD_FILE))[0].write_text("{")
    assert REFUSED[asked] in command(*asked.split(), code=2).err


def test_the_page_names_everything_that_pooling_checks() -> None:
    page = (HOW_TO / "read_results.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == set(POOL_KINDS)
