"""A miniature is the same run with fewer steps: its phases keep their shares, and it can be carried out."""

import pytest

from peft_vit.backbones import describe
from peft_vit.config import Augmentation, PeftAdaLoraConfig, Rotate90
from peft_vit.data import make_splits, open_index
from peft_vit.forecasting.calibration import calibration_run
from peft_vit.methods import check
from peft_vit.records import RunSpec
from peft_vit.training import steps_per_epoch

pytestmark = pytest.mark.part("runner")


def spec_of(config, place: int = 0, **training) -> RunSpec:
    experiment = config.experiments[place]
    experiment = experiment.model_copy(update={"training": experiment.training.model_copy(update=training)})
    return RunSpec(
        study=config.name,
        seed=3,
        experiment=experiment,
        backbone=config.backbone,
        data=config.data,
        device=config.device,
        precision=config.precision,
        threads=config.threads,
    )


def small(spec: RunSpec, total_steps: int) -> RunSpec:
    index = open_index(spec.data)
    return calibration_run(
        spec, total_steps, describe(spec.backbone, 32), index, make_splits(index, spec.data, spec.seed)
    )


def steps_of(spec: RunSpec) -> int:
    training = spec.experiment.training
    return training.epochs * steps_per_epoch(spec.data.train_images, training.batch_size)


@pytest.fixture
def large(study):
    """Make a study of some methods that trains on 800 of the digits, 100 steps an epoch."""

    def make(*methods: str):
        config = study(*methods)
        data = config.data.model_copy(update={"train_images": 800, "validation_images": 300, "test_images": 300})
        return config.model_copy(update={"data": data})

    return make


def test_it_has_a_few_steps_and_one_validation_batch(large) -> None:
    spec = spec_of(large("lora"), epochs=30)
    found = small(spec, 3000)
    assert steps_of(found) == 8
    assert (found.data.train_images, found.data.validation_images, found.data.test_images) == (64, 32, 32)
    kept = {"lora", "peft_lora", "adalora", "qa_lora", "method"}
    assert found.experiment.model_dump(include=kept) == spec.experiment.model_dump(include=kept)
    assert found.experiment.training.batch_size == spec.experiment.training.batch_size
    assert (found.backbone, found.threads, found.precision) == (spec.backbone, spec.threads, spec.precision)


def test_runs_share_it_if_they_differ_in_nothing_that_costs(large) -> None:
    config = large("lora")
    reference = small(spec_of(config, epochs=30), 3000)
    for training in (
        {"learning_rate": 0.1},
        {"epochs": 100},
        {"weight_decay": 0.3},
        {"schedule": "constant"},
        {"label_smoothing": 0.1},
        {"warmup_share": 0.2},
    ):
        spec = spec_of(config, **{"epochs": 30, **training})
        assert small(spec, 100 * spec.experiment.training.epochs) == reference
    renamed = spec_of(config, epochs=30).model_copy(update={"study": "other", "seed": 9})
    assert small(renamed, 3000) == reference
    drawn = spec_of(config, epochs=30)
    drawn = drawn.model_copy(update={"data": drawn.data.model_copy(update={"test_split": "per_seed"})})
    assert small(drawn, 3000) == reference
    rotated = (Augmentation(rotate90=Rotate90()),)
    for training in ({"batch_size": 16}, {"optimizer": "sgd"}, {"augmentation": rotated}):
        assert small(spec_of(config, epochs=30, **training), 3000) != reference
    assert small(spec_of(config, epochs=30).model_copy(update={"threads": 2}), 3000) != reference


def test_phases_keep_their_shares(large) -> None:
    config = large("adalora", "qa_adalora")
    adalora = config.experiments[0].adalora.model_copy(
        update={"warmup_steps": 250, "update_frequency": 50, "final_steps": 500}
    )
    spec = spec_of(config, epochs=20)
    spec = spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"adalora": adalora})})
    found = small(spec, 2000).experiment.adalora
    assert (found.warmup_steps, found.final_steps) == (1, 2)  # an eighth and a quarter of 8
    quantized = small(spec_of(config, 1, epochs=20), 2000).experiment.qa_lora
    assert quantized.quantization_end_step == 5  # two thirds


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("total_steps", [8, 100, 12_345])
@pytest.mark.parametrize("method", ["adalora", "qa_adalora", "adaptive_bits", "peft_adalora"])
def test_it_passes_the_checks_of_a_plan(large, method, total_steps) -> None:
    config = large("linear" if method == "peft_adalora" else method)
    spec = spec_of(config)
    if method == "peft_adalora":
        pytest.importorskip("peft")
        section = PeftAdaLoraConfig(update_frequency=2, warmup_steps=max(1, total_steps // 2), final_steps=1)
        experiment = spec.experiment.model_copy(update={"method": method, "peft_adalora": section})
        spec = spec.model_copy(update={"experiment": experiment})
    shape = describe(spec.backbone, 32)
    check(spec.experiment, shape, total_steps, 800)
    found = small(spec, total_steps)
    check(found.experiment, shape, steps_of(found), found.data.train_images)


def test_every_class_keeps_an_image(large) -> None:
    spec = spec_of(large("linear"), batch_size=1)
    found = small(spec, 800)
    assert found.data.train_images == 16  # 8 would leave two digits without one
    index = open_index(found.data)
    assert set(index.labels[make_splits(index, found.data, 0).train]) == set(range(10))


def test_a_short_run_is_its_own_calibration_run(study) -> None:
    spec = spec_of(study("lora"), epochs=1)
    assert steps_of(small(spec, 3)) == 3
