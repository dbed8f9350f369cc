"""A list of learning rates stands for an experiment a rate, and a fault in it is named where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_vit.config import StudyConfig, load_study
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("configuration")

STUDY = """\
name: tiny
seeds: [0]
backbone: {model: vit_tiny_patch16_224, weights: random}
data: {dataset: digits, image_size: 32, train_images: 64, validation_images: 32, test_images: 32}
training:
  epochs: 2
  learning_rate: [3e-4, 1e-3, 2.5e-2]
experiments:
  - name: probe
    method: full
  - name: low_rank
    method: lora
    training: {learning_rate: [1, 10]}
    lora: {rank: 4}
  - name: fixed
    method: lora
    training: {learning_rate: 3e-3}
    lora: {rank: 2}
"""


def load(tmp_path: Path, content: str) -> StudyConfig:
    file = tmp_path / "study.yaml"
    file.write_text(content)
    return load_study(file)


def refusal(tmp_path: Path, content: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    return str(caught.value).removeprefix(str(tmp_path))


def test_one_experiment_a_rate_in_the_order_of_the_file(tmp_path: Path) -> None:
    study = load(tmp_path, STUDY)
    assert [(one.name, one.training.learning_rate) for one in study.experiments] == [
        ("probe_lr_3e-4", 3e-4),
        ("probe_lr_1e-3", 1e-3),
        ("probe_lr_2_5e-2", 2.5e-2),
        ("low_rank_lr_1e0", 1.0),
        ("low_rank_lr_1e1", 10.0),
        ("fixed", 3e-3),
    ]
    assert [one.lora.rank for one in study.experiments if one.lora] == [4, 4, 2]


def test_it_is_the_study_that_writes_the_experiments_out(tmp_path: Path) -> None:
    listed = STUDY.split("  - name: low_rank", maxsplit=1)[0]
    written = listed.split("  - name: probe")[0].replace("[3e-4, 1e-3, 2.5e-2]", "1e-3") + "".join(
        f"  - {{name: probe_lr_{name}, method: full, training: {{learning_rate: {rate}}}}}\n"
        for name, rate in (("3e-4", 3e-4), ("1e-3", 1e-3), ("2_5e-2", 0.025))
    )
    assert load(tmp_path, listed) == load(tmp_path, written)


@pytest.mark.parametrize(
    "rates", ["[]", "[0]", "[-1]", "[1e-3, fast]", "[1e-3, 0.001]", "[1e999]", "[[1e-3]]", "[true]"]
)
def test_what_is_no_list_of_rates(rates: str, tmp_path: Path) -> None:
    shared = refusal(tmp_path, STUDY.replace("[3e-4, 1e-3, 2.5e-2]", rates))
    assert shared.startswith("/study.yaml:7: training.learning_rate: expected a number above 0, or a list of some that")
    own = refusal(tmp_path, STUDY.replace("[1, 10]", rates))
    assert own.startswith("/study.yaml:13: experiments[1].training.learning_rate: expected a number above 0, or a list")


def test_a_fault_of_an_experiment_with_a_list_is_named_once_and_where_it_stands(tmp_path: Path) -> None:
    message = refusal(tmp_path, STUDY.replace("{rank: 4}", "{rank: 0}"))
    assert message.startswith("/study.yaml:14: experiments[1].lora.rank: ")
    assert "more fault" not in message
    assert refusal(tmp_path, STUDY.replace("name: probe", "nam: probe")).startswith(
        "/study.yaml:9: experiments[0].nam: "
    )


def test_names_that_meet_after_expansion_are_refused(tmp_path: Path) -> None:
    assert "'probe_lr_1e-3' stands twice" in refusal(tmp_path, STUDY.replace("name: fixed", "name: probe_lr_1e-3"))
