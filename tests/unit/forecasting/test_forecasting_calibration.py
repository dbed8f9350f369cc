"""A calibration run is the same run with fewer steps, of which each phase has its share; what it took is kept."""

import shutil
from pathlib import Path

import pytest

from peft_vit.core.backbones import describe
from peft_vit.core.config import Augmentation, BackboneConfig, PeftAdaLoraConfig, Rotate90
from peft_vit.core.methods import check
from peft_vit.core.records import RunSpec
from peft_vit.core.training import Progress
from peft_vit.data import make_splits, open_index
from peft_vit.runs.costs import timing_run as timing_runs
from peft_vit.runs.costs.timing_run import MeasuredCosts, cache_costs, cached_costs, timing_run
from peft_vit.runs.execute import run_one
from peft_vit.runs.scheduling.plan import plan_study, spec_of
from peft_vit.runs.scheduling.profiling import costs_of, measure_costs

pytestmark = pytest.mark.part("runner")

COSTS = MeasuredCosts(start_s=2.0, step_s=0.5, image_s=0.01, peak_memory_bytes=400_000_000, images=50)


def run_of(config, place: int = 0, **training) -> RunSpec:
    spec = spec_of(config, place, 0)
    changed = spec.experiment.model_copy(update={"training": spec.experiment.training.model_copy(update=training)})
    return spec.model_copy(update={"experiment": changed})


def small(spec: RunSpec, total_steps: int, **limits: int) -> RunSpec:
    index = open_index(spec.data)
    splits = make_splits(index, spec.data, spec.seed)
    return timing_run(spec, total_steps, describe(spec.backbone, 32), index, splits, **limits)


def steps_of(spec: RunSpec) -> int:
    training = spec.experiment.training
    return training.epochs * training.epoch_steps(spec.data.train_images)


@pytest.fixture
def large(study):
    """Make a study of some methods that trains on 800 of the digits, 100 steps an epoch."""

    def make(*methods: str):
        config = study(*methods)
        data = config.data.model_copy(update={"train_images": 800, "validation_images": 300, "test_images": 300})
        return config.model_copy(update={"data": data})

    return make


def test_it_has_a_few_steps_and_a_few_validation_batches(large, study) -> None:
    spec = run_of(large("lora"), epochs=30)
    short = small(spec, 3000)
    assert steps_of(short) == 8
    assert (short.data.train_images, short.data.validation_images, short.data.test_images) == (64, 32, 32)
    methods = {"lora", "peft_lora", "adalora", "qa_lora", "method"}
    assert short.experiment.model_dump(include=methods) == spec.experiment.model_dump(include=methods)
    assert short.experiment.training.batch_size == spec.experiment.training.batch_size
    assert (short.backbone, short.threads, short.precision) == (spec.backbone, spec.threads, spec.precision)
    fewer = small(spec, 3000, at_most=3, evaluated=5)
    assert (steps_of(fewer), fewer.data.validation_images, fewer.data.test_images) == (3, 5, 5)
    assert steps_of(small(run_of(study("lora"), epochs=1), 3)) == 3  # a short run is its own


def test_runs_share_it_if_they_differ_in_nothing_that_costs(large) -> None:
    config = large("lora")
    reference = small(run_of(config, epochs=30), 3000)
    alike = {
        "learning_rate": 0.1, "epochs": 100, "weight_decay": 0.3, "schedule": "constant", "label_smoothing": 0.1,
        "warmup_share": 0.2,
    }  # fmt: skip
    other = {"batch_size": 16, "optimizer": "sgd", "augmentation": (Augmentation(rotate90=Rotate90()),)}
    for name, value in {**alike, **other}.items():
        spec = run_of(config, **{"epochs": 30, name: value})
        assert (small(spec, 100 * spec.experiment.training.epochs) == reference) == (name in alike)
    named = run_of(config, epochs=30).model_copy(update={"study": "other", "seed": 9})
    drawn = named.model_copy(update={"data": named.data.model_copy(update={"test_split": "per_seed"})})
    assert small(named, 3000) == small(drawn, 3000) == reference
    assert small(run_of(config, epochs=30).model_copy(update={"threads": 2}), 3000) != reference


def test_phases_keep_their_shares(large) -> None:
    config = large("adalora", "qa_adalora")
    phases = {"warmup_steps": 250, "update_frequency": 50, "final_steps": 500}
    spec = run_of(config, epochs=20)
    adalora = spec.experiment.adalora.model_copy(update=phases)
    spec = spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"adalora": adalora})})
    short = small(spec, 2000).experiment.adalora
    assert (short.warmup_steps, short.final_steps) == (1, 2)  # an eighth and a quarter of 8
    assert small(run_of(config, 1, epochs=20), 2000).experiment.qa_lora.quantization_end_step == 5  # two thirds


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("total_steps", [8, 100, 12_345])
@pytest.mark.parametrize("method", ["adalora", "qa_adalora", "adaptive_bits", "peft_adalora"])
def test_it_passes_the_checks_of_a_plan(large, method, total_steps) -> None:
    spec = run_of(large("linear" if method == "peft_adalora" else method))
    if method == "peft_adalora":
        pytest.importorskip("peft")
        section = PeftAdaLoraConfig(update_frequency=2, warmup_steps=max(1, total_steps // 2), final_steps=1)
        experiment = spec.experiment.model_copy(update={"method": method, "peft_adalora": section})
        spec = spec.model_copy(update={"experiment": experiment})
    shape = describe(spec.backbone, 32)
    check(spec.experiment, shape, total_steps, 800)
    short = small(spec, total_steps)
    check(short.experiment, shape, steps_of(short), short.data.train_images)


def test_every_class_keeps_an_image(large) -> None:
    short = small(run_of(large("linear"), batch_size=1), 800)
    assert short.data.train_images == 16  # 8 would leave two digits without one
    index = open_index(short.data)
    assert set(index.labels[make_splits(index, short.data, 0).train]) == set(range(10))


# --- what it took -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kinds_of(tmp_path):
    """Return the calibration runs that a plan asks for."""

    def make(config) -> dict[str, RunSpec]:
        kinds_found = {}
        plan_study(config, tmp_path, file=tmp_path / "a.yaml", measure=lambda kinds: kinds_found.update(kinds) or {})
        return kinds_found

    return make


def test_it_measures_real_runs_and_keeps_what_it_found_and_says_what_fails(study, tmp_path, own_cache) -> None:
    config, told, out = study("lora", "qa_adalora", "full", epochs=20), [], tmp_path / "out"

    def measure(kinds):
        gone = kinds["full"].data.model_copy(update={"image_size": 33})
        return measure_costs(kinds | {"full": kinds["full"].model_copy(update={"data": gone})}, told.append)

    plan = plan_study(config, out, file=tmp_path / "a.yaml", measure=measure)
    assert told[:3] == ["measuring 1 of 3: lora", "measuring 2 of 3: qa_adalora", "measuring 3 of 3: full"]
    assert told[3].startswith("full could not be measured (data.image_size: 33 is not a multiple of 16")
    assert [run.estimate.basis for run in plan.runs] == ["calibration", "calibration", "estimate"]
    assert all(run.estimate.seconds > 0 for run in plan.runs)
    assert 2e8 < plan.runs[0].estimate.peak_memory_bytes < 4e9
    assert not out.exists()  # it is kept in the cache, and only there
    assert len(list((own_cache / "costs").iterdir())) == 2
    asked: list[str] = []
    again = plan_study(config, out, file=tmp_path / "a.yaml", measure=lambda kinds: asked.extend(kinds) or {})
    assert asked == ["full"]
    assert [run.estimate for run in again.runs[:2]] == [run.estimate for run in plan.runs[:2]]


def test_costs_are_of_one_kind_machine_and_version(study, kinds_of, own_cache, monkeypatch) -> None:
    (kind,) = kinds_of(study("lora")).values()
    cache_costs(kind, COSTS)
    assert cached_costs(kind) == COSTS
    assert cached_costs(kind.model_copy(update={"threads": 2})) is None
    others = {"processor_name": "another one", "package_versions": {"torch": "9"}, "instruction_limits": ["AVX2", ""]}
    for name, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(timing_runs, name, lambda *_, other=other: other)
            assert cached_costs(kind) is None


def test_costs_are_of_the_configuration_in_a_model_s_folder(study, kinds_of, own_cache, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    (kind,) = kinds_of(study("lora")).values()
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    backbone = BackboneConfig(library="transformers", model=str(tmp_path / "base"), weights="random")
    kind = kind.model_copy(update={"backbone": backbone})
    transformers.ViTConfig(**settings).save_pretrained(tmp_path / "base")
    cache_costs(kind, COSTS)
    assert cached_costs(kind) == COSTS
    transformers.ViTConfig(**settings | {"num_hidden_layers": 12}).save_pretrained(tmp_path / "base")
    assert cached_costs(kind) is None


def test_a_damaged_file_is_measured_anew_and_one_that_cannot_be_written_is_no_failure(
    study, kinds_of, own_cache, caplog
) -> None:
    (kind,) = kinds_of(study("lora")).values()
    cache_costs(kind, COSTS)
    (file,) = (own_cache / "costs").iterdir()
    for content in ("", "[]", "{}", '{"start_s": NaN}', "[" * 100_000, COSTS.model_dump_json().replace("400", "-4")):
        caplog.clear()
        file.write_text(content)
        assert cached_costs(kind) is None
        (message,) = caplog.messages
        assert message.startswith(f"{file} can't be used (")
        assert message.isprintable()
    cache_costs(kind, COSTS)
    assert cached_costs(kind) == COSTS
    shutil.rmtree(own_cache / "costs")
    (own_cache / "costs").write_text("in the way")
    cache_costs(kind, COSTS)
    assert cached_costs(kind) is None


def test_steps_validations_and_the_rest_are_told_apart(study, cache) -> None:
    """Steps of 2 s, the first of 5 s, two validations of 1 s with 20 images each, 30 test images, and the rest."""
    record = run_one(spec_of(study("lora"), 0, 0)).record.model_copy(update={"seconds": 28.5})
    ends = [5.0, 7.0, 9.0, 10.0, 12.0, 14.0, 16.0, 17.0]
    steps = [1, 2, 3, 3, 4, 5, 6, 6]
    costs = costs_of(record, [(Progress(step, 6, 0.5, None), end) for step, end in zip(steps, ends, strict=True)])
    assert (costs.step_s, costs.image_s, costs.images) == (2.0, 1 / 20, 24 + 20 + 30)
    assert costs.start_s == pytest.approx(28.5 - 6 * 2 - 2 * 1 - 30 / 20)
    single = record.model_copy(update={"steps": record.steps[:1]})
    costs = costs_of(single, [(Progress(1, 1, 0.5, None), 5.0), (Progress(1, 1, 0.5, 0.5), 7.0)])
    assert (costs.step_s, costs.image_s) == (record.steps[0].seconds, 2.0 / 20)
