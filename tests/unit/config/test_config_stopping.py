"""What a study says of comparisons that stop; a section that could decide nothing is refused where it stands."""

from pathlib import Path

import pytest

from peft_vit.config import StudyConfig, load_study
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("configuration")

STUDY = """\
name: tiny
seeds: [{seeds}]
backbone: {{model: test_vit, weights: random}}
data: {{dataset: digits, image_size: 32, train_images: 64, validation_images: 32{data}}}
training: {{epochs: 2, learning_rate: 1e-3}}
experiments:
  - {{name: lora_r4, method: lora, lora: {{rank: 4}}}}
{experiments}stopping: {{{stopping}}}
"""
OTHER = "  - {name: lora_r2, method: lora, lora: {rank: 2}}\n"
PROBES = "".join(f"  - {{name: probe_{n}, method: linear, training: {{batch_size: {n}}}}}\n" for n in (8, 16))


def load(
    tmp_path: Path, stopping: str, seeds: int = 10, experiments: str = OTHER, data: str = ", test_images: 32"
) -> StudyConfig:
    file = tmp_path / "study.yaml"
    listed = ", ".join(map(str, range(seeds)))
    file.write_text(STUDY.format(seeds=listed, stopping=stopping, experiments=experiments, data=data))
    return load_study(file)


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        ("control: lora_r4, margin: 1, looks: [5, 10]", (5, 10)),
        ("control: lora_r2, margin: 0.5, every: 4, spending: pocock", (4, 8, 10)),
        ("control: lora_r4, asked: superiority, every: 10", (10,)),
    ],
)
def test_looks_end_at_the_number_of_seeds(tmp_path, said, looks) -> None:
    stopping = load(tmp_path, said).stopping
    assert stopping is not None
    assert stopping.looks_at(10) == looks


SOUND = "control: lora_r4, asked: superiority, every: 5"
NONINFERIOR = "control: lora_r4, asked: non-inferiority, margin: 1, every: 5"


@pytest.mark.parametrize(
    ("said", "changes", "field", "problem"),
    [
        ("control: lora, margin: 1, every: 5", {}, "stopping", "'lora' is none of the study's experiments"),
        (SOUND, {"experiments": ""}, "stopping", "no other experiment"),
        (SOUND, {"seeds": 1}, "stopping", "needs 2 seeds and more"),
        (SOUND, {"seeds": 4}, "stopping", "every: 5 is more than the study's 4 seeds"),
        ("control: lora_r4, margin: 1, looks: [5, 8]", {}, "stopping", "looks end at 8, and the study has 10 seeds"),
        ("control: lora_r4, margin: 1, looks: [8, 5, 10]", {}, "stopping", "looks have to rise"),
        ("control: lora_r4, margin: 1, looks: [1, 10]", {}, "stopping.looks[0]", "greater than or equal to 2"),
        ("control: lora_r4, margin: 1, every: 1", {}, "stopping.every", "greater than or equal to 2"),
        ("control: lora_r4, margin: 1, looks: []", {}, "stopping.looks", "at least 1 item"),
        ("control: lora_r4, margin: 1", {}, "stopping", "needs the field 'looks', or 'every'"),
        ("control: lora_r4, margin: 1, looks: [5, 10], every: 5", {}, "stopping", "exclude each other"),
        ("control: lora_r4, every: 5", {}, "stopping", "asked: both needs the field 'margin'"),
        (f"{SOUND}, margin: 1", {}, "stopping", "'margin' has no effect with asked: superiority"),
        ("control: lora_r4, margin: 0, every: 5", {}, "stopping.margin", "greater than 0"),
        ("control: lora_r4, margin: 100, every: 5", {}, "stopping.margin", "less than 100"),
        (f"{SOUND}, level: 0.5", {}, "stopping.level", "less than 0.5"),
        (f"{SOUND}, images: 400", {"data": ", folds: 5"}, "stopping", "with asked: non-inferiority alone"),
        (f"{NONINFERIOR}, images: 400", {}, "stopping", "with data.folds alone"),
        (f"{NONINFERIOR}, images: 0", {"data": ", folds: 5"}, "stopping.images", "greater than or equal to 1"),
        (f"{SOUND}, futility: 1", {}, "stopping.futility", "less than 1"),
        (f"{SOUND}, spending: anytime", {}, "stopping.spending", "'obrien-fleming' or 'pocock'"),
        (f"{SOUND}, metric: loss", {}, "stopping.metric", "'accuracy' or 'balanced_accuracy'"),
        ("control: probe_8, margin: 1, every: 5", {"experiments": PROBES}, "stopping", "the same with every seed"),
    ],
)
def test_what_could_decide_nothing_is_refused_where_it_stands(tmp_path, said, changes, field, problem) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, said, **changes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    line = (tmp_path / "study.yaml").read_text().splitlines().index(f"stopping: {{{said}}}") + 1
    assert message.startswith(f"{tmp_path / 'study.yaml'}:{line}: {field}: ")
    assert problem in message


def test_probes_that_see_other_images_with_each_seed_are_compared(tmp_path) -> None:
    said = "control: probe_8, asked: superiority, every: 5"
    assert load(tmp_path, said, experiments=PROBES, data=", test_images: 32, test_split: per_seed").stopping
    assert load(tmp_path, said, experiments=PROBES, data=", folds: 5").stopping
    assert load(tmp_path, "control: lora_r4, asked: superiority, every: 5", experiments=PROBES).stopping
