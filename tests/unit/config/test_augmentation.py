"""What `training.augmentation` and the recipe beside it may say, and what is refused, in one line."""

from pathlib import Path

import pytest

from peft_vit.config import Augmentation, StudyConfig, TrainingConfig, bytes_of, load_study
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("configuration")
HEAD = """\
name: tiny
seeds: [0]
backbone: {model: test_vit, weights: random}
data: {dataset: digits, image_size: 32, train_images: 24, validation_images: 20}
"""


def load(tmp_path: Path, training: str, method: str = "lora", own: str = "{}") -> StudyConfig:
    section = ", lora: {rank: 2}" if method == "lora" else ""
    file = tmp_path / "study.yaml"
    file.write_text(
        f"{HEAD}training:\n  {{steps: 9, learning_rate: 1e-3, {training}}}\nexperiments:\n"
        f"  - {{name: one, method: {method}, training: {own}{section}}}\n"
    )
    return load_study(file)


def of(study: StudyConfig) -> list[dict]:
    return [one.model_dump() for one in study.experiments[0].training.augmentation]


def test_names_alone_and_names_with_settings(tmp_path: Path) -> None:
    text = (
        "augmentation: [flip, rotate90, random_resized_crop: {scale: [0.5, 1]}, color_jitter, "
        "rand_augment: {num_ops: 1}, {mixup: {alpha: 0.2}}, cutmix: ]"
    )
    study = load(tmp_path, text)
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}
    assert of(study) == [
        {"flip": {"direction": "horizontal"}},
        {"rotate90": {}},
        {"random_resized_crop": {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}},
        {"color_jitter": jitter},
        {"rand_augment": {"num_ops": 1, "magnitude": 9}},
        {"mixup": {"alpha": 0.2}},
        {"cutmix": {"alpha": 1.0}},
    ]
    assert StudyConfig.model_validate_json(study.model_dump_json()) == study
    assert of(load(tmp_path, "augmentation: []")) == []
    assert of(load(tmp_path, "label_smoothing: 0.1")) == [{"flip": {"direction": "horizontal"}}]


@pytest.mark.parametrize(
    ("training", "field", "words"),
    [
        ("augmentation: [flipp]", "augmentation[0]", "is called 'flipp' (did you mean flip?); expected one of flip, "),
        ("augmentation: [mix_up]", "augmentation[0]", "(did you mean mixup?); expected"),
        ("augmentation: [xyz: {}]", "augmentation[0]", "is called 'xyz'; expected one of flip, rotate90"),
        ("augmentation: flip", "augmentation", "list"),
        ("augmentation: [3]", "augmentation[0]", "expected one of flip,"),
        ("augmentation: [{flip: {}, mixup: {}}]", "augmentation[0]", "expected one of flip,"),
        ("augmentation: [flip, mixup: {alpa: 1}]", "augmentation[1].mixup.alpa", "unknown key here"),
        ("augmentation: [flip: {direction: up}]", "augmentation[0].flip.direction", "should be 'horizontal' or 'both'"),
        ("augmentation: [mixup: {alpha: 0}]", "augmentation[0].mixup.alpha", "greater than 0"),
        ("augmentation: [random_resized_crop: {scale: [0.9, 0.2]}]", "augmentation[0]", "0 < low <= high"),
        ("augmentation: [random_resized_crop: {scale: [0.9, 2]}]", "augmentation[0]", "at most the image's area"),
        ("augmentation: [random_resized_crop: {scale: [1, 1], ratio: [1, 1]}]", "augmentation[0]", "nothing changes"),
        ("augmentation: [color_jitter: {brightness: 0, contrast: 0, saturation: 0}]", "augmentation[0]", "all four"),
        ("augmentation: [rand_augment: {magnitude: 31}]", "augmentation[0].rand_augment.magnitude", "equal to 30"),
        ("augmentation: [flip, flip: {direction: both}]", "augmentation", "flip stands twice; remove one"),
        ("augmentation: [mixup, flip]", "augmentation", "mixup mixes whole batches, after all that changes single"),
        ("augmentation: [cutmix], batch_size: 1", "", "augmentation: cutmix has no effect with batch_size: 1"),
        ("label_smoothing: 1", "label_smoothing", "less than 1"),
        ("warmup_share: 1", "warmup_share", "less than 1"),
        ("warmup_share: 0.1, schedule: constant", "", "warmup_share has no effect with schedule: constant; remove it"),
        ("warmup_share: 0.9, schedule: warmup_stable_decay", "", "comes down over the last fifth; give at most 0.8"),
        ("micro_batch_size: 0", "micro_batch_size", "greater than or equal to 1"),
        ("micro_batch_size: 5", "", "micro_batch_size: 5 does not divide the batch of 32; take 4"),
        ("micro_batch_size: 64", "", "micro_batch_size: 64 does not divide the batch of 32; take 16"),
        ("micro_batch_size: 32", "", "32 is the whole batch, which is what passes without it; remove it, or take 16"),
        ("micro_batch_size: 1, batch_size: 1", "", "micro_batch_size: 1 is the whole batch, which is what passes"),
        ("activation_checkpointing: all", "activation_checkpointing", "should be 'none', 'blocks' or 'adaptive'"),
        (
            "activation_checkpointing: adaptive",
            "",
            "as many blocks again as memory_limit needs; add memory_limit, as in 1GB",
        ),
        ("memory_limit: 1000000000", "memory_limit", "1000000000 has no unit; write it with one of B, kB, MB, GB, KiB"),
        ("memory_limit: 1GBit", "memory_limit", "'1GBit' is not a size above 0 with its unit, B, kB, MB, GB, KiB, MiB"),
        ("memory_limit: 0GB", "memory_limit", "'0GB' is not a size above 0 with its unit"),
        ("memory_limit: 1GB, activation_checkpointing: none", "", "activation_checkpointing: none does so, too;"),
        ("memory_limit: 1GB, activation_checkpointing: blocks", "", "memory_limit decides what is computed again, and"),
        ("recomputed_blocks: 2", "", "recomputed_blocks has no effect with activation_checkpointing: none; remove it"),
        ("activation_checkpointing: adaptive, recomputed_blocks: -1", "recomputed_blocks", "greater than or equal"),
        ("layer_decay: 1", "layer_decay", "less than 1"),
        ("layer_decay: 0.7", "", "training.layer_decay has no effect with method: lora, which trains no weights"),
    ],
)
def test_what_is_refused_is_named_in_one_line(tmp_path: Path, training: str, field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, training)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert words in message
    assert f"training.{field}" in message if field else "experiments[0]" in message
    assert message.startswith(str(tmp_path / "study.yaml:"))


def test_layer_decay_is_for_full_fine_tuning(tmp_path: Path) -> None:
    assert load(tmp_path, "layer_decay: 0.7", "full").experiments[0].training.layer_decay == 0.7


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


@pytest.mark.parametrize("setting", ["micro_batch_size: 4", "activation_checkpointing: blocks", "memory_limit: 1GB"])
def test_a_probe_keeps_no_activations(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "study.yaml"
    probe = f"  - {{name: one, method: linear, training: {{{setting}}}}}\n"
    file.write_text(f"{HEAD}experiments:\n{probe}")
    with pytest.raises(UserError, match=rf"training\.{setting.partition(':')[0]}: has no effect on a linear"):
        load_study(file)


def test_an_older_file_is_told_what_to_write(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        HEAD.replace("validation_images: 20", "validation_images: 20, flips: none")
        + "experiments:\n  - {name: one, method: linear}\n"
    )
    with pytest.raises(UserError, match=r"study.yaml:4: data.flips: is said by training.augmentation: \[\] for none"):
        load_study(file)


def test_a_probe_sees_flips_alone(tmp_path: Path) -> None:
    """Of a study's list it takes the flips; a list of its own, or of a study of probes, may hold nothing else."""
    unseen = r"augmentation\[1\]: has no effect on a linear probe, which is fitted to each image and its flips; remove"
    assert load(tmp_path, "augmentation: [flip: {direction: both}]", own="{}").experiments[0].training.flips == "both"
    with pytest.raises(UserError, match=r"experiments\[0\]\.training\." + unseen):
        load(tmp_path, "batch_size: 4", "linear", "{augmentation: [flip, mixup]}")
    file = tmp_path / "study.yaml"
    probe = "experiments:\n  - {name: probe, method: linear}\n"
    file.write_text(HEAD + "training: {augmentation: [flip, rotate90]}\n" + probe)
    with pytest.raises(UserError, match=r"study.yaml:5: training\." + unseen):
        load_study(file)
    file.write_text(
        HEAD + "training: {augmentation: [rotate90, flip: {direction: both}, mixup], steps: 9, learning_rate: 1e-3}\n"
        f"{probe}  - {{name: low_rank, method: lora, lora: {{rank: 1}}}}\n"
    )
    first, second = load_study(file).experiments
    assert [one.name for one in first.training.augmentation] == ["flip"]
    assert first.training.flips == second.training.flips == "both"
    assert [one.name for one in second.training.augmentation] == ["rotate90", "flip", "mixup"]


def test_names_do_in_the_library_too() -> None:
    config = TrainingConfig(steps=1, learning_rate=1.0, augmentation=("rotate90", {"mixup": {"alpha": 0.2}}))
    assert config.augmentation == (Augmentation(rotate90={}), Augmentation(mixup={"alpha": 0.2}))
    assert hash(config) == hash(TrainingConfig.model_validate(config.model_dump()))
