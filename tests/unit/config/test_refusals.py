"""Everything that a file of the right form can say wrongly: one line with file, line, field, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from peft_vit.base.errors import UserError
from peft_vit.core.config import METHOD_KINDS, QaLoraConfig, load_study

pytestmark = pytest.mark.part("configuration")

TOP = {
    "name": "tiny",
    "seeds": "[0, 1]",
    "backbone": "{model: test_vit, weights: random}",
    "data": "{dataset: digits, image_size: 32, validation_images: 20}",
    "training": "{epochs: 2, learning_rate: 1e-3}",
}
SECTIONS: dict[str, str] = {
    "lora": "rank: 4",
    "adalora": "total_rank_budget: 8, allocation_strategy: proportional, importance_metric: magnitude, "
    "update_frequency: 2, warmup_steps: 4",
    "qa_lora": "quantization_bits: 4, quantization_type: nf4, use_group_quantization: true",
    "peft_lora": "rank: 2",
    "peft_adalora": "update_frequency: 1, warmup_steps: 1",
}
UNVALIDATED = "{dataset: digits, image_size: 32, validation_images: 0}"
OTHER = "{name: other, method: full}"
UNPACKED = "quantization_bits: null, quantization_type: null"  # null: the setting is left out


def refusal(
    tmp_path: Path, lines: dict[str, str], experiments: str, word: str, *, is_alone: bool = False
) -> tuple[int | None, str | None]:
    """Return the line and the field, after checking that it is one short line with this word that names the file."""
    file = tmp_path / "study.yaml"
    above = "".join(f"{key}: {value}\n" for key, value in {**TOP, **lines}.items())
    file.write_text(f"{above}experiments:\n  - {experiments}\n")
    with pytest.raises(UserError, match=re.escape(word)) as caught:
        load_study(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert not (is_alone and "more fault" in caught.value.message)
    assert caught.value.file is not None
    name, _, line = caught.value.file.removeprefix(str(tmp_path)).partition(":")
    assert name == "/study.yaml"
    return int(line) if line else None, caught.value.field


# By key of the file: what is said (+: beside what is there), the field below the key, and a word of its fault alone.
OF_THE_FILE: dict[str, list[tuple[str, str, str]]] = {
    "colour": [("red", "", "unknown key")],
    "'a b'": [("1", "", "unknown key")],
    "name": [
        ("12", "", "string"),
        ("../a", "", "lower-case"),
        ("a" * 65, "", "at most 64"),
        ('"tiny\\n"', "", "lower"),
    ],
    "description": [('"\\ud800"', "", "half a character")],
    "precision": [("fp16", "", "'bf16'")],
    "seeds": [
        (f"[0, {'9' * 60}]", "[1]", "less than 2147483648"),
        ("[0, -1]", "[1]", "greater than or equal to 0, got -1"),
        ("[]", "", "at least 1 item"),
        ("3", "", "list, got 3"),
        ("[4, 4]", "", "twice"),
    ],
    "backbone": [
        ("{model: a, weights: random, colour: red}", ".colour", "unknown key"),
        ("{model: a, weights: file}", "", "needs the field 'file'"),
        ("{model: a, weights: random, head_blocks: 2}", ".head_blocks", "1 or 4"),
        ("{model: a, weights: file, file: ''}", ".file", "is empty; fill it in"),
        ("{model: a, weights: random, file: a.pth}", "", "no effect with weights: random"),
        (f"{{model: a, weights: file, file: a, sha256: {'A' * 64}}}", ".sha256", "pattern"),
        ("{model: a, library: transformers, weights: random, sha256: null, file: a}", "", "a model of transformers"),
        (f"{{model: a, library: transformers, weights: random, sha256: {'a' * 64}}}", "", "weights: random"),
    ],
    "data": [
        ("{image_size: 32, validation_images: 20}", ".dataset", "is missing; add it"),
        ("{dataset: mnist, image_size: 32, validation_images: 20}", ".dataset", "'elpv', 'digits'"),
        ("{dataset: hf, image_size: 32, validation_images: 20}", "", "needs the field 'path'"),
        ("{dataset: image-folder, path: '', image_size: 32, validation_images: 20}", ".path", "is empty"),
        ('{dataset: csv, path: "a\\0b", image_size: 32, validation_images: 20}', ".path", "control character"),
        ("+image_size: 64", ".image_size", "twice"),
        ("+1: 2", "", "must be text, not 1"),
        ("+~: 2", "", "must be text, not None"),
        ("+[a]: 2", "", "must be text, not a list"),
        ("{dataset: digits, image_size: 32, validation_images: 1}", ".validation_images", "at least 2, or 0"),
        ("+flips: none", ".flips", "unknown key"),
        ("+label_column: y", ".label_column", "dataset: digits"),
        ("+hub_subset: y", ".hub_subset", "dataset: hf"),
        ("+images_file: y", ".images_file", "image-folder"),
        ("+train_images: 9, shots_per_class: 2", ".train_images", "with shots_per_class"),
        ("+folds: 5, tested_images: 9", ".tested_images", "with folds"),
        ("+folds: 5, test_split: per_seed", "", "test_split: per_seed has no effect"),
    ],
    "measures": [("{latency_batches: [1, 1]}", ".latency_batches", "twice"), ("{removal_images: 9}", "", "no effect")],
    "training": [
        ("[]", "", "expected a mapping of settings, got []"),
        ("{epoch: 2, learning_rate: 1e-3}", ".epoch", "spelling"),
        ("{epochs: two, learning_rate: 1e-3}", ".epochs", "valid integer, got 'two'"),
        ("{epochs: 010, learning_rate: 1e-3}", ".epochs", "valid integer, got '010'"),
        ("{epochs: 1:30, learning_rate: 1e-3}", ".epochs", "valid integer, got '1:30'"),
        (f"{{epochs: {'9' * 5000}, learning_rate: 1e-3}}", ".epochs", "too many digits"),
        ("{epochs: 2, steps: 9, learning_rate: 1e-3}", ".epochs", "with steps"),
        ("{epochs: 2}", "experiments[0]", "learning_rate is missing"),
        ("{learning_rate: 1e-3}", "experiments[0]", "epochs (or training.steps) is missing"),
        ("{epochs: 2, learning_rate: .nan}", ".learning_rate", "valid number"),
        ("{epochs: 2, learning_rate: 1e999}", ".learning_rate", "finite number"),
        *(
            (f"{{epochs: 2, learning_rate: {rates}}}", ".learning_rate", "or a list of some that differ")
            for rates in ("[]", "[0]", "[1e-3, fast]", "[1e-3, 0.001]", "[1e999]", "[[1e-3]]", "[true]")
        ),
        ("+schedule: cosine", ".schedule", "'warmup_stable_decay'"),
        ("+head_start: zero", ".head_start", "'random' or 'probe'"),
        ("+patience: 3", ".patience", "schedule: one_cycle"),
        ("+probe_l2: 0.1", ".probe_l2", "no probe is fitted"),
        ("+augmentation: [cutmix], batch_size: 1", "", "cutmix has no effect"),
        ("+warmup_share: 0.1, schedule: constant", ".warmup_share", "constant"),
        ("+warmup_share: 0.9, schedule: warmup_stable_decay", "", "at most 0.8"),
        ("+micro_batch_size: 5", "", "does not divide the batch of 32 into several parts; take 4"),
        ("+micro_batch_size: 64", "", "does not divide the batch of 32 into several parts; take 16"),
        ("+activation_checkpointing: adaptive", "", "add memory_limit"),
        ("+memory_limit: 1000000000", ".memory_limit", "has no unit"),
        ("+memory_limit: 1GBit", ".memory_limit", "not a size above 0"),
        ("+memory_limit: 0GB", ".memory_limit", "not a size above 0"),
        ("+memory_limit: 1GB, activation_checkpointing: none", "", "memory_limit decides"),
        ("+recomputed_blocks: 2", ".recomputed_blocks", "adaptive"),
    ],
    "augmentation": [  # of training
        ("[flipp]", "[0]", "(did you mean flip?)"),
        ("[xyz: {}]", "[0]", "'xyz'; expected one of flip"),
        ("flip", "", "list"),
        ("[3]", "[0]", "expected one of flip,"),
        ("[{flip: {}, mixup: {}}]", "[0]", "one of flip"),
        ("[mixup: {alpa: 1}]", "[0].mixup.alpa", "unknown"),
        ("[random_resized_crop: {scale: [0.9, 0.2]}]", "[0].random_resized_crop.scale", "0 < low <= high"),
        ("[random_resized_crop: {scale: [0.9, 2]}]", "[0].random_resized_crop", "at most the image's area"),
        ("[flip, flip]", "", "twice"),
        ("[mixup, flip]", "", "put it last"),
    ],
}
# By method and section: settings that are changed, the field below the experiment, and such a word.
OF_METHODS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("lora", "lora"): [
        ("rank: true", ".rank", "valid integer, got True"),
        ("<<: {scale: 1.0}", ".'<<'", "unknown key"),
        ("targets: [query, query]", ".targets", "twice"),
        ("targets: [<b>]", ".targets[0]", "pattern"),
        ("rank: null", "", "exactly one of rank, start, ranks; got none"),
        ("start: folder", "", "got rank and start"),
        ("rank: null, start: ''", ".start", "is empty"),
        ("rank: null, start: folder, scale: 2.0", ".scale", "with start"),
        ("rank: null, start: folder, targets: [fc1]", ".targets", "with start"),
        ("rank: null, ranks: {rule: eve, budget: 9}", ".ranks.rule", "'even'"),
        ("rank: null, ranks: {rule: even, budget: 9, maximum_rank: 2}", ".ranks.maximum_rank", "rule: even"),
        ("rank: null, ranks: {rule: even, budget: 9, site_rank: 2}", ".ranks.site_rank", "rule: even"),
    ],
    ("peft_lora", "peft_lora"): [("rank: null", ".rank", "is missing"), ("start: folder", ".start", "unknown key")],
    ("peft_adalora", "peft_adalora"): [("initial_rank: 8", "", "target_rank 8 does not lie below initial_rank 8")],
    ("adalora", "adalora"): [
        ("initial_budget: 7", "", "initial_budget lies below total_rank_budget"),
        ("initial_budget: 9, budget_schedule: constant", ".initial_budget", "budget_schedule: constant"),
        ("factor_start: orthonormal", ".factor_start", "parametrization: product"),
        ("lambda_gain: 10.0", ".lambda_gain", "set parametrization: svd"),
        ("orthogonality_weight: 0.1", ".orthogonality_weight", "parametrization: svd"),
        ("total_rank_budget: null", "", "got none"),
        ("total_byte_budget: 9000", "", "got total_rank_budget and total_byte_budget"),
        ("minimum_rank: 3, maximum_rank: 2", "", "maximum_rank lies below minimum_rank"),
        ("top_k: 3", ".top_k", "allocation_strategy: proportional; remove it, or set allocation_strategy: top_k"),
        ("threshold_tau: 1.0", ".threshold_tau", "allocation_strategy: proportional"),
        ("sensitivity_beta: 0.85", ".sensitivity_beta", "importance_metric: gradient_norm, fisher or sensitivity"),
        ("importance_metric: fisher, uncertainty_beta: 0.85", ".uncertainty_beta", "importance_metric: fisher"),
        ("importance_metric: fisher, importance_gradient: task_and_penalty", "", "needs a penalty"),
        ("allocation_strategy: global, budget_schedule: constant", "", "where every triplet stays"),
        ("allocation_strategy: global, importance_metric: uniform", "", "is not a control for allocation_strategy"),
    ],
    ("qa_lora", "qa_lora"): [
        ("use_group_quantization: yes", ".use_group_quantization", "valid boolean, got 'yes'"),
        ("quantization_bits: 9", ".quantization_bits", "got 9"),
        ("quantization_bits: 8", "", "nf4 stores 4 bits, quantization_bits says 8"),
        ("use_group_quantization: false, group_size: 64", ".group_size", "use_group_quantization: false"),
        ("use_double_quant: true", ".use_double_quant", "unknown key here; remove it"),
        ("quantization_bits: 3, quantization_type: nf3", ".quantization_type", "'int3', 'int4' or 'int8', got 'nf3'"),
        ("quantization_end_step: 5", ".quantization_end_step", "quantization_schedule: linear or cosine"),
        (
            "quantization_schedule: linear, quantization_warmup_steps: 9, quantization_end_step: 9",
            "",
            "must lie after quantization_warmup_steps",
        ),
        ("calibration_images: 9", ".calibration_images", "rounding: nearest"),
        ("balance_by: gradient_scale", ".balance_by", "without balance_target"),
        ("balance_target: 0.5, balance_by: schedule_pace", "", "with a constant schedule"),
        (f"{UNPACKED}, adaptive_bits: {{}}", ".adaptive_bits", "exactly one of average_bits, total_byte_budget"),
        (f"{UNPACKED}, adaptive_bits: {{average_bits: 4.0, ranks: true}}", ".adaptive_bits.ranks", "total_byte_budget"),
        (f"{UNPACKED}, adaptive_bits: {{average_bits: 4.0, types: [int4]}}", ".adaptive_bits.types", "at least 2"),
        (f"{UNPACKED}, adaptive_bits: {{average_bits: 4.0, types: [int4, int4]}}", ".adaptive_bits.types", "twice"),
        (f"{UNPACKED}, adaptive_bits: {{average_bits: 4.0, types: [int4, nf4]}}", ".adaptive_bits", "of the same bits"),
        ("adaptive_bits: {average_bits: 4.0}, quantization_type: null", ".quantization_bits", "with adaptive_bits"),
        (f"{UNPACKED}, adaptive_bits: {{total_byte_budget: 9, ranks: true}}, rank: 8", "", "rank has no effect"),
        (UNPACKED, "", "give quantization_bits and quantization_type, or adaptive_bits"),
    ],
    ("qa_linear", "qa_lora"): [
        ("rank: 8", ".rank", "method: qa_linear"),
        ("scale: 2.0", ".scale", "method: qa_linear"),
        (f"{UNPACKED}, adaptive_bits: {{total_byte_budget: 9, ranks: true}}", ".adaptive_bits.ranks", "qa_linear"),
    ],
}


@pytest.mark.parametrize(
    ("key", "said", "field", "word"), [(key, *case) for key, cases in OF_THE_FILE.items() for case in cases]
)
def test_what_a_file_says_wrongly(key: str, said: str, field: str, word: str, tmp_path: Path) -> None:
    if key == "augmentation":
        key, said, field = "training", f"+augmentation: {said}", f".augmentation{field}"
    if said.startswith("+"):
        said = f"{TOP[key][:-1]}, {said[1:]}}}"
    named = field if field.startswith("experiments") else f"{key}{field}"
    experiment = "{name: one, method: lora, lora: {rank: 4}}"
    if key == "measures" and not field:
        experiment, named = "{name: one, method: full}", ""
    line, place = refusal(tmp_path, {key: said}, f"{experiment}\n  - {OTHER}", word)
    assert (place or "") == named
    if named.startswith(key):
        assert line == list({**TOP, key: said}).index(key) + 1


@pytest.mark.parametrize(
    ("method", "section", "changes", "field", "word"),
    [(*place, *case) for place, cases in OF_METHODS.items() for case in cases],
)
def test_what_a_section_says_wrongly(
    method: str, section: str, changes: str, field: str, word: str, tmp_path: Path
) -> None:
    left_out = yaml.safe_load(f"{{{changes}}}").keys()
    unchanged = [setting for setting in SECTIONS[section].split(", ") if setting.partition(":")[0] not in left_out]
    settings = ", ".join([*unchanged, *re.sub(r"\w+: null,? ?", "", changes).split(", ")]).removesuffix(", ")
    experiment = f"{{name: one, method: {method}, {section}: {{{settings}}}}}"
    assert refusal(tmp_path, {}, f"{experiment}\n  - {OTHER}", word) == (
        len(TOP) + 2,
        f"experiments[0].{section}{field}",
    )


@pytest.mark.parametrize(
    ("experiment", "field", "word"),
    [
        ("{name: ../probe, method: linear}", ".name", "lower-case"),
        ("{name: other, method: linear}", "s", "'other' occurs twice"),
        ("{name: one, method: dora}", ".method", "'linear', 'qa_linear', 'full'"),
        ("{name: one, method: lora, lora: [4]}", ".lora", "mapping, got [4]"),
        ("{name: one, method: full, training: 0}", ".training", "mapping, got 0"),
        ("{name: one, method: lora, lora: {rank: 2}, peft_lora: {rank: 2}}", "", "'peft_lora:' has no effect"),
        ("{name: one, method: lora, lora: {rank: 2}, training: {layer_decay: 0.7}}", ".training.layer_decay", "full"),
        ("{name: one, method: full, training: {compute: int8}}", ".training.compute", "method: full, since"),
        (
            "{name: one, method: peft_lora, peft_lora: {rank: 2}, training: {compute: int8}}",
            ".training.compute",
            "peft_lora, since",
        ),
        ("{name: one, method: full, training: {learning_rate: []}}", ".training.learning_rate", "or a list of some"),
        ("{name: one, method: linear, training: {learning_rate: 1e-3}}", ".training.learning_rate", "linear probe"),
        ("{name: one, method: linear, training: {memory_limit: 1GB}}", ".training.memory_limit", "linear probe"),
        ("{name: one, method: linear, training: {augmentation: [flip, mixup]}}", ".training.augmentation", "mixup has"),
        *(
            (f"{{name: one, method: {name}}}", "", f"method: {name} needs a section")
            for name, kind in METHOD_KINDS.items()
            if kind.settings
        ),
    ],
)
def test_what_an_experiment_says_wrongly(experiment: str, field: str, word: str, tmp_path: Path) -> None:
    place = (len(TOP) + 1, "experiments") if field == "s" else (len(TOP) + 2, f"experiments[0]{field}")
    assert refusal(tmp_path, {}, f"{experiment}\n  - {OTHER}", word) == place


@pytest.mark.parametrize(
    ("lines", "experiment", "word"),
    [
        ({"training": "{augmentation: [flip, rotate90]}"}, "method: linear", "rotate90 has no effect on a linear"),
        ({"training": "{epochs: 2}"}, "method: linear", "has no effect on a linear probe"),
        *(
            ({"data": UNVALIDATED}, f"method: full, training: {{{setting}}}", "of 'one' counts validations")
            for setting in ("validate_every: 2", "patience: 2, schedule: constant")
        ),
        (
            {"data": UNVALIDATED, "measures": "{removal_images: 4}"},
            "method: lora, lora: {rank: 2}",
            "measures.removal_images is of validation images",
        ),
    ],
)
def test_what_contradicts_itself_between_places(lines, experiment: str, word: str, tmp_path: Path) -> None:
    refusal(tmp_path, lines, f"{{name: one, {experiment}}}\n  - {{name: two, {experiment}}}", word)


@pytest.mark.parametrize(
    ("experiments", "word", "place"),
    [
        ("{name: low, method: lora, lora: {rank: 0}}", "or equal to 1", (len(TOP) + 2, "experiments[0].lora.rank")),
        ("{name: full, method: full, colour: red}", "unknown key", (len(TOP) + 2, "experiments[0].colour")),
        (
            "{name: full, method: full}\n  - {name: full_lr_1e-3, method: full, training: {learning_rate: 1}}",
            "full_lr_1e-3",
            (None, "experiments"),
        ),
    ],
)
def test_a_fault_beside_a_list_of_rates_is_named_once(
    experiments: str, word: str, place: tuple, tmp_path: Path
) -> None:
    lines = {"training": "{epochs: 2, learning_rate: [1e-3, 1e-2]}"}
    assert refusal(tmp_path, lines, experiments, word, is_alone=True) == place


def test_a_setting_without_effect_is_refused_in_code_too() -> None:
    """By its value: code, like a record, may spell out a default."""
    given = {"quantization_bits": 4, "quantization_type": "nf4", "use_group_quantization": False}
    assert QaLoraConfig(**given, group_size=32).pool == 1
    with pytest.raises(ValueError, match="group_size\n  has no effect with use_group_quantization: false"):
        QaLoraConfig(**given, group_size=64)
