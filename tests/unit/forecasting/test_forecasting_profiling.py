"""A calibration does real steps in a worker process, is kept, and serves the next plan; what fails is said."""

import json
from pathlib import Path

import pytest

from peft_vit.forecasting.calibration import Costs, keep_costs, known_costs
from peft_vit.runs.execute import run_one
from peft_vit.studies import profiling
from peft_vit.studies.plan import plan_study
from peft_vit.studies.profiling import Speed, costs_of, measure_costs
from peft_vit.training import Progress

pytestmark = pytest.mark.part("runner")

STEADY = Speed(1000.0, 1.0)
COSTS = Costs(start_s=2.0, step_s=0.5, image_s=0.01, peak_memory_bytes=400_000_000, images=50)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kinds_of(config, folder) -> dict:
    found = {}
    plan_study(config, folder, file=folder / "tiny.yaml", measure=lambda kinds: found.update(kinds) or {})
    return found


def test_it_measures_real_runs_and_keeps_what_it_found(study, tmp_path, own_cache, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "machine_speed", lambda: STEADY)
    config = study("lora", "qa_adalora", epochs=20)
    told: list[str] = []

    def measure(kinds):
        return measure_costs(kinds, told.append)

    out = tmp_path / "out"
    plan = plan_study(config, out, file=tmp_path / "tiny.yaml", measure=measure)
    assert told == ["measuring 1 of 2: lora", "measuring 2 of 2: qa_adalora"]
    assert {run.estimate.basis for run in plan.runs} == {"calibration"}
    low_rank, adaptive = (run.estimate for run in plan.runs)
    assert min(low_rank.seconds, adaptive.seconds) > 0
    assert 2e8 < low_rank.peak_memory_bytes < 4e9
    assert not out.exists()  # it is kept in the cache, and only there
    assert len(list((own_cache / "costs").iterdir())) == 2
    again = plan_study(config, out, file=tmp_path / "tiny.yaml", measure=lambda kinds: pytest.fail(str(kinds)))
    assert [run.estimate for run in again.runs] == [run.estimate for run in plan.runs]


def test_what_fails_is_said_and_estimated(study, tmp_path, own_cache, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "machine_speed", lambda: STEADY)
    config = study("lora", "full")
    kinds = kinds_of(config, tmp_path)
    gone = kinds["full"].data.model_copy(update={"image_size": 33})
    kinds["full"] = kinds["full"].model_copy(update={"data": gone})
    told: list[str] = []
    assert set(measure_costs(kinds, told.append)) == {"lora"}
    assert told[-1].startswith("full could not be measured (data.image_size: 33 is not a multiple of 16")
    assert told[-1].endswith("; its time and memory are estimated")
    assert known_costs(kinds["full"]) is None


@pytest.mark.slow
def test_what_a_busy_machine_took_serves_once_and_is_not_kept(study, tmp_path, own_cache, monkeypatch) -> None:
    kinds = kinds_of(study("full", "lora"), tmp_path)
    told: list[str] = []
    speeds = iter((STEADY, Speed(700.0, 1.0), Speed(700.0, 1.0)))
    monkeypatch.setattr(profiling, "machine_speed", lambda: next(speeds))
    assert set(measure_costs(kinds, told.append)) == {"full", "lora"}
    busy = "the machine was busy (its speed before and after differs by 30%, more than 20%)"
    assert told[1] == f"full: {busy}; its time serves this plan and is not kept"
    assert known_costs(kinds["full"]) is None
    assert known_costs(kinds["lora"]) is not None


def test_costs_are_of_one_kind_machine_and_version(study, tmp_path, own_cache, monkeypatch) -> None:
    (kind,) = kinds_of(study("lora"), tmp_path).values()
    keep_costs(kind, COSTS)
    assert known_costs(kind) == COSTS
    assert known_costs(kind.model_copy(update={"threads": 2})) is None
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.forecasting.calibration.processor_name", lambda: "another one")
        assert known_costs(kind) is None
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.forecasting.calibration.package_versions", lambda: {"torch": "9"})
        assert known_costs(kind) is None
    assert known_costs(kind) == COSTS


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"costs": {"start_s": NaN}}', "[" * 100_000, '{"costs": 7}'])
def test_a_damaged_file_is_measured_anew(study, tmp_path, own_cache, caplog, content) -> None:
    (kind,) = kinds_of(study("lora"), tmp_path).values()
    keep_costs(kind, COSTS)
    (file,) = (own_cache / "costs").iterdir()
    assert json.loads(file.read_text())["depends_on"]["run"]["threads"] == 1
    file.write_text(content)
    assert known_costs(kind) is None
    (message,) = caplog.messages
    assert message.startswith(f"{file} is of no use (")
    assert message.isprintable()
    keep_costs(kind, COSTS)
    assert known_costs(kind) == COSTS


def test_a_cache_that_cannot_be_written_is_no_failure(study, tmp_path, own_cache) -> None:
    (kind,) = kinds_of(study("lora"), tmp_path).values()
    own_cache.mkdir(exist_ok=True)
    (own_cache / "costs").write_text("in the way")
    keep_costs(kind, COSTS)
    assert known_costs(kind) is None


def test_steps_validations_and_the_rest_are_told_apart(study, tmp_path, cache) -> None:
    """Steps of 2 s, the first of 5 s, two validations of 1 s with 20 images each, 30 test images, and the rest."""
    record = run_one(plan_study(study("lora"), tmp_path, file=tmp_path / "tiny.yaml").runs[0].spec).record
    ends = [5.0, 7.0, 9.0, 10.0, 12.0, 14.0, 16.0, 17.0]
    steps = [1, 2, 3, 3, 4, 5, 6, 6]
    seen = [(Progress(step, 6, 0.5, None), end) for step, end in zip(steps, ends, strict=True)]
    found = costs_of(record.model_copy(update={"seconds": 28.5}), seen)
    assert (found.step_s, found.image_s, found.images) == (2.0, 1 / 20, 24 + 20 + 30)
    assert found.start_s == pytest.approx(28.5 - 6 * 2 - 2 * 1 - 30 / 20)


def test_a_run_of_a_single_step_has_costs_too(study, tmp_path, cache) -> None:
    record = run_one(plan_study(study("lora"), tmp_path, file=tmp_path / "tiny.yaml").runs[0].spec).record
    single = record.model_copy(update={"seconds": 28.5, "steps": record.steps[:1]})
    found = costs_of(single, [(Progress(1, 1, 0.5, None), 5.0), (Progress(1, 1, 0.5, 0.5), 7.0)])
    assert (found.step_s, found.image_s) == (record.steps[0].seconds, 2.0 / 20)
