"""A study that declares looks is run by them: what is decided stops, and what is open goes on."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_runs import PlantedRuns, study_of_loras

from experiments.stopping import until_decided
from experiments.stopping.comparisons import declared, follow_study
from experiments.stopping.until_decided import run_until_decided
from peft_vit.core.config import study_from_mapping
from peft_vit.lab.analysis import read_results
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.records.storage import RECORD_FILE, read_record

pytestmark = pytest.mark.part("analyzer")

SEEDS = 12
NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3, 0.4, -0.2, 0.6)  # points
LEAD = {"ahead": 6.0, "level": 0.3, "behind": -6.0}  # of the control, points
STOPPING: dict[str, Any] = {"control": "base", "margin": 1.0, "looks": [4, 8, SEEDS]}


def mapping(**changes: Any) -> dict[str, Any]:
    """Return a study whose control has the largest rank; one of its rivals has none."""
    loras = study_of_loras("colours", ("level", "ahead", "base"), SEEDS)
    behind = {"name": "behind", "method": "linear", "training": {}}
    return loras | {"stopping": STOPPING, "experiments": [*loras["experiments"][::-1], behind], **changes}


def write(file: Path, **changes: Any) -> Path:
    file.write_text(json.dumps({key: value for key, value in mapping(**changes).items() if value is not None}))
    return file


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: write(tmp_path / "colours.yaml", **changes)


def accuracy(name: str, seed: int) -> float:
    own = LEAD[name] + NOISE[seed % SEEDS] if name in LEAD else 0.0
    return 0.7 + 0.001 * seed + own / 100


def plant(patch: pytest.MonkeyPatch, executor: PlantedRuns) -> PlantedRuns:
    """Let every run end at once with the accuracy that is planted for it."""
    patch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: executor)
    patch.setattr("peft_vit.runs.executors.decode_images", lambda _: None)
    patch.setenv("COLUMNS", "140")
    return executor


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> PlantedRuns:
    return plant(monkeypatch, PlantedRuns(accuracy))


@pytest.fixture
def follows(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Return a call of the script on the study's file: what it prints, after checking its exit code."""

    def call(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        ended = 0
        try:
            until_decided.main([str(argument) for argument in arguments])
        except SystemExit as error:
            ended = int(error.code or 0)
        out, err = capsys.readouterr()
        assert ended == code, err
        return out, err

    return call


def lines_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if " minus base, " in line]


def seeds_of(output: Path) -> dict[str, int]:
    return {name: len([*(output / "colours" / name).glob(f"seed_*/{RECORD_FILE}")]) for name in ("base", *LEAD)}


WHOLE = {"base": 12, "ahead": 8, "level": 12, "behind": 8}


def test_what_is_decided_stops_and_what_is_open_goes_on(follows, command, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    lines = lines_of(follows(file(), "--output", out)[0])
    assert [line.split(":")[0] for line in lines] == [
        *(f"{name} minus base, {pairs} pairs of at most 12" for pairs in (4, 8) for name in LEAD),
        "level minus base, 12 pairs of at most 12",
    ]
    assert lines[3:5] == [  # 6 and the mean of eight of NOISE
        "ahead minus base, 8 pairs of at most 12: +6.11 points [+5.06, +7.16]. not worse by 1? supported (takes +0.05; "
        "the opposite -2.05). better? supported (takes +1.05; the opposite -1.05). Decided.",
        "level minus base, 8 pairs of at most 12: +0.41 points [-0.64, +1.46]. not worse by 1? supported (takes +0.05; "
        "the opposite -2.05). better? not decided (takes +1.05; the opposite -1.05). Continues to 12.",
    ]
    assert lines[6].endswith("better? not decided (takes +0.55; the opposite -0.55). Ends here.")
    assert seeds_of(out) == WHOLE
    assert len(runs.done) == sum(WHOLE.values())
    again = follows(file(), "--output", out)[0]
    assert lines_of(again) == [lines[3], lines[6], lines[5]], "nothing is done again"
    assert len(runs.done) == sum(WHOLE.values())
    assert "40 done + 0 failed + 0 pending + 0 running + 8 skipped" in command("status", out).out


def test_a_command_that_was_killed_goes_on(follows, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    for after in (3, 29):
        runs.left = after - len(runs.done)
        follows(file(), "--output", out, code=130)
        assert sum(seeds_of(out).values()) == after
    runs.left = 100
    assert lines_of(follows(file(), "--output", out)[0])[-1].startswith("level minus base, 12 pairs")
    assert seeds_of(out) == WHOLE
    assert len(set(runs.done)) == len(runs.done), "what was done was not done again"


def test_a_run_that_fails_leaves_its_comparison_open(follows, file, runs, tmp_path) -> None:
    out = tmp_path / "out"
    runs.accuracy = lambda name, seed: None if (name, seed) == ("behind", 5) else accuracy(name, seed)
    said, err = follows(file(), "--output", out, code=1)
    assert "colours/behind/seed_5 failed: it was planted" in err
    assert "Open: behind; the same command continues." in said
    assert seeds_of(out)["ahead"] == 8
    runs.accuracy = accuracy
    last = lines_of(follows(file(), "--output", out)[0])[-1]
    assert last.startswith("behind minus base, 8 pairs of at most 12: -5.89 points")
    assert seeds_of(out) == WHOLE
    runs.accuracy = lambda name, seed: None if (name, seed) == ("base", 4) else accuracy(name, seed)
    said, _ = follows(file(), "--output", tmp_path / "other", code=1)
    assert "Open: ahead, level, behind;" in said


def test_it_is_called_from_python_and_ends_when_the_time_is_over(runs, tmp_path) -> None:
    now = [0.0]

    def takes_a_minute(name: str, seed: int) -> float:
        now[0] += 60
        return accuracy(name, seed)

    runs.accuracy = takes_a_minute
    study = study_from_mapping(mapping(), file=Path("built in memory"))
    told: list[str] = []

    def call(minutes: float) -> list[str]:
        limit = Limit(minutes, now[0], clock=lambda: now[0])
        failed, still_open = run_until_decided(study, Path("built in memory"), tmp_path, limit, told.append)
        assert failed == {}
        return still_open

    assert call(10) == [*LEAD]
    assert len(runs.done) == 10
    assert told == []
    assert call(25) == ["level"]
    assert [line.split(":")[0] for line in told[3:]] == [f"{name} minus base, 8 pairs of at most 12" for name in LEAD]
    assert call(1000) == []
    assert seeds_of(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stopping": None}, "stopping: is missing"),
        ({"stopping": {**STOPPING, "control": "none"}}, "'none' is not one"),
    ],
)
def test_what_declares_no_looks_is_refused_and_nothing_is_run(follows, file, runs, tmp_path, changes, said) -> None:
    out = tmp_path / "out"
    assert f"error: {tmp_path / 'colours.yaml'}: " in (err := follows(file(**changes), "--output", out, code=2)[1])
    assert said in err
    follows(file(), "--output", out, "--minutes", 0, code=2)
    assert runs.done == []
    assert not list(tmp_path.rglob("study.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": list(range(SEEDS))[::-1]},
        {"seeds": list(range(SEEDS + 1)), "stopping": {**STOPPING, "looks": [4, 8, SEEDS + 1]}},
        {"experiments": mapping()["experiments"][:-1]},
        {"stopping": {**STOPPING, "level": 0.1}},
    ],
)
def test_what_was_declared_stays(follows, file, runs, tmp_path, changes) -> None:
    out = tmp_path / "out"
    runs.left = 10
    follows(file(), "--output", out, code=130)
    runs.left = 100
    assert "was begun with" in follows(file(**changes), "--output", out, code=2)[1]
    assert len(runs.done) == 10


@pytest.mark.usefixtures("in_this_process")
def test_runs_that_train_are_compared_by_what_they_reach(follows, images, weights, tmp_path, monkeypatch) -> None:
    """Colours that are told apart after six steps of all weights, and not by an adapter that hardly moves."""
    monkeypatch.setattr("peft_vit.core.adapters.footprint.release_memory", lambda: None)  # which walks all of pytest
    training = {"steps": 6, "validate_every": 6, "batch_size": 12}
    folder = {"dataset": "image-folder", "path": str(images), "image_size": 32, "test_split": "per_seed"}
    study = mapping(
        seeds=list(range(6)),
        backbone={"model": "test_vit", "weights": "file", "file": str(weights)},
        data={**folder, "train_images": 24, "validation_images": 6, "test_images": 18},
        experiments=[
            {"name": "idle", "method": "lora", "lora": {"rank": 1}, "training": {**training, "learning_rate": 1e-6}},
            {"name": "learns", "method": "full", "training": {**training, "learning_rate": 3e-3}},
        ],
        stopping={"control": "idle", "asked": "superiority", "every": 3, "spending": "pocock"},
    )
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(study))
    said, _ = follows(file, "--output", tmp_path)
    (line,) = [line for line in said.splitlines() if " minus idle, " in line]
    accuracies = {
        name: [read_record(tmp_path / f"colours/{name}/seed_{seed}" / RECORD_FILE).test.accuracy for seed in range(3)]
        for name in ("idle", "learns")
    }
    lead = sum(accuracies["learns"]) / 3 - sum(accuracies["idle"]) / 3
    assert f"learns minus idle, 3 pairs of at most 6: {100 * lead:+.2f} points" in line
    assert line.endswith("Decided.")
    assert len([*(tmp_path / "colours").glob("*/seed_*")]) == 6


# --- what is said of a study of which two comparisons were decided early ---


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, _session_cache: str) -> Path:
    """Return the results of a study of which two comparisons were decided at the second look, and one never."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        plant(patch, PlantedRuns(accuracy))
        study = study_from_mapping(mapping(name="stopped"), file=Path("stopped.yaml"))
        run_until_decided(study, Path("stopped.yaml"), out, None, print)
    return out


def test_the_findings_end_with_what_the_looks_said(stopped, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["findings", str(stopped)])
    runpy.run_module("experiments.hypotheses.findings", run_name="__main__")
    said = capsys.readouterr().out.partition("Comparisons with base that stop")[2]
    (study,) = read_results(stopped).studies
    configuration = declared(study)
    assert configuration is not None
    for course in follow_study(configuration, study):
        (row,) = (line for line in said.splitlines() if line.startswith(f" {course.name} "))
        look = course.looks[-1]
        p_values = (look.noninferiority, look.superiority)
        if course.name == "behind":
            assert [f"refuted (p = {test.opposite_p_value:.3g})" in row for test in p_values] == [True, True]
        else:
            assert all(f"(p = {test.p_value:.3g})" in row for test in p_values)
