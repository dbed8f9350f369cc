"""What a section `stopping` may say, and from records to courses: which pairs count, in which order, by which rule."""

from typing import Any

import planted
import pytest

from experiments.stopping.comparisons import (
    StoppingConfig,
    follow_study,
    paired,
    stopping_of,
    stopping_rule,
    stopping_table,
)
from experiments.stopping.sequential import StoppingRule, follow
from peft_vit.base.errors import UserError
from peft_vit.core.config import StudyConfig
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import Scores
from peft_vit.lab.analysis import Study

pytestmark = pytest.mark.part("analyzer")

NAMES = ("lora_r8", "lora_r4", "lora_r2")
EXPERIMENTS = planted.experiments()
SEEDS = (5, 3, 9, 1, 7, 2)  # in the order in which they count
LEAD = {"lora_r8": 0, "lora_r4": 12, "lora_r2": -30}  # of 600 images
NOISE = {5: 3, 3: -2, 9: 4, 1: -5, 7: 1, 2: 2}


def configuration(data: dict[str, Any] | None = None, **stopping: Any) -> StudyConfig:
    data = {"dataset": "elpv", "image_size": 84, "validation_images": 400, **(data or {"test_images": 600})}
    rule = {"control": "lora_r8", "margin": 1.5, "looks": [2, 4, 6], **stopping}
    return planted.configuration([EXPERIMENTS[name] for name in NAMES], seeds=list(SEEDS), data=data, stopping=rule)


def difference(name: str, seed: int) -> float:
    """Return what is planted, as a share."""
    return (LEAD[name] + (NOISE[seed] if name != "lora_r8" else 0)) / 600


def record(name: str, seed: int, **changes: Any) -> RunRecord:
    return planted.record(EXPERIMENTS[name], seed, 0.75 + difference(name, seed), **changes)


def study() -> Study:
    return planted.study_of([record(n, seed) for n in NAMES for seed in SEEDS])


@pytest.mark.parametrize(
    ("name", "seed", "left"), [("", 0, 6), ("lora_r4", 9, 2), ("lora_r8", 9, 2), ("lora_r4", 3, 1)]
)
@pytest.mark.parametrize("moved", [False, True])
def test_pairs_count_in_the_declared_order_up_to_the_first_seed_that_lacks_a_run_or_has_other_images(
    name, seed, left, moved
) -> None:
    made = [record(n, s) for n in NAMES for s in SEEDS if (n, s) != (name, seed)]
    made += [record(name, seed, provenance_changes={"split_sha256": "e" * 64})] if moved and name else []
    by_seed = paired(planted.study_of(made), SEEDS, "lora_r4", "lora_r8")
    assert list(by_seed) == list(SEEDS[:left])
    assert list(by_seed.values()) == pytest.approx([difference("lora_r4", seed) for seed in by_seed])


def test_a_study_that_is_not_begun_is_open() -> None:
    results = follow_study(configuration(), None)
    assert [(result.name, result.looks, result.stopped, result.next_look) for result in results] == [
        ("lora_r4", (), None, 2),
        ("lora_r2", (), None, 2),
    ]


RULES: dict[str, tuple[dict[str, Any], StoppingRule]] = {
    "both": ({}, StoppingRule("both", 0.015, (2, 4, 6))),
    "superiority": (
        {"asked": "superiority", "margin": None, "looks": None, "every": 4, "spending": "pocock", "level": 0.1},
        StoppingRule("superiority", 0.5, (4, 6), level=0.1, form="pocock"),
    ),
    "never futile": ({"futility": 0}, StoppingRule("both", 0.015, (2, 4, 6), futility=0)),
    "folds": ({"data": {"folds": 5}}, StoppingRule("both", 0.015, (2, 4, 6), correlation=600 / 512)),
}


@pytest.mark.parametrize("case", RULES)
def test_the_rule_is_what_was_declared(case) -> None:
    said, rule = RULES[case]
    differences = {name: [round(difference(name, seed), 12) for seed in SEEDS] for name in NAMES[1:]}
    assert follow_study(configuration(**said), study()) == follow(differences, rule)


def test_the_correlation_of_folds_does_not_depend_on_what_else_is_done() -> None:
    sizes = {seed: {"train": 512 - place, "validation": 400, "test": 600} for place, seed in enumerate(SEEDS)}
    made = [record(n, s).model_copy(update={"split_sizes": sizes[s]}) for n in NAMES for s in SEEDS]
    whole = follow_study(configuration(data={"folds": 5}), planted.study_of(made))
    some = [result for result in made if result.spec.seed in SEEDS[:2]]
    part = follow_study(configuration(data={"folds": 5}), planted.study_of(some))
    assert [result.looks[0] for result in part] == [result.looks[0] for result in whole]


# --- what may be declared ---


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        ({"looks": [2, 6]}, (2, 6)),
        ({"looks": None, "every": 4, "spending": "pocock"}, (4, 6)),
        ({"looks": None, "every": 6, "asked": "superiority", "margin": None}, (6,)),
    ],
)
def test_looks_end_at_the_number_of_seeds(said, looks) -> None:
    stopping = stopping_of(configuration(**said))
    assert stopping is not None
    assert stopping.looks_at(len(SEEDS)) == looks


@pytest.mark.parametrize(
    ("said", "field", "words"),
    [
        ({"control": "lora"}, "", "'lora' is not one of the study's experiments"),
        ({"looks": None, "every": 7}, "", "every: 7 is more than the study's 6 seeds"),
        ({"looks": [3, 5]}, "", "looks end at 5, and the study has 6 seeds"),
        ({"looks": [4, 2, 6]}, "", "looks have to rise"),
        ({"looks": [1, 6]}, ".looks.0", "greater than or equal to 2"),
        ({"looks": []}, ".looks", "at least 1 item"),
        ({"looks": None}, "", "exactly one of looks, every; got none"),
        ({"every": 2}, "", "got looks and every"),
        ({"margin": None}, "", "asked: both needs the field 'margin'"),
        ({"asked": "superiority"}, ".margin", "asked: superiority"),
        ({"margin": 0}, ".margin", "greater than 0"),
        ({"spending": "anytime"}, ".spending", "'pocock'"),
        ({"image": 400}, ".image", "unknown key"),
    ],
)
def test_what_is_declared_wrongly_is_refused_with_its_field(said, field, words) -> None:
    with pytest.raises(UserError) as caught:
        stopping_of(configuration(**said))
    assert words in str(caught.value)
    assert caught.value.field == f"stopping{field}"


def test_probes_are_compared_where_they_see_other_images_with_each_seed() -> None:
    probes = [EXPERIMENTS["linear_probe"].model_copy(update={"name": name}) for name in ("probe", "probe_8")]
    stopping = {"control": "probe", "asked": "superiority", "every": 2}

    def of(**data: Any) -> StudyConfig:
        data = {"dataset": "elpv", "image_size": 84, "validation_images": 400, **data}
        return planted.configuration(probes, seeds=[0, 1], data=data, stopping=stopping)

    for by_seed in ({"test_images": 600, "test_split": "per_seed"}, {"folds": 5}):
        assert stopping_of(of(**by_seed)) is not None
    with pytest.raises(UserError, match=r"^stopping: .* the same with every seed"):
        stopping_of(of(test_images=600))


# --- the table ---


@pytest.mark.parametrize(
    ("asked", "questions"),
    [("superiority", ["better?"]), ("non-inferiority", ["not worse by 1?"]), ("both", ["not worse by 1?", "better?"])],
)
def test_comparisons_that_stop_stand_with_what_was_asked_of_them(asked: str, questions: list[str]) -> None:
    margin = {} if asked == "superiority" else {"margin": 1.0}
    stopping = StoppingConfig.model_validate({"control": "base", "asked": asked, "looks": (2, 4), **margin})
    rule = stopping_rule(stopping, 4)
    made = stopping_table(follow({"ahead": [0.05, 0.06, 0.05, 0.06], "open": []}, rule), stopping, Scores())
    assert made.columns == ("experiment", "pairs", "difference (points)", *questions, "state")
    assert [(row[1], row[-1]) for row in made.rows] == [("4", "decided"), ("0", "open")]
    assert set(made.rows[1][3:-1]) == {"not decided"}
    assert made.data[0]["control"] == "base"
