"""From records to the courses of comparisons: which pairs count, in which order, and by which rule."""

from typing import Any

import planted
import pytest
from peft_vit.lab.analysis.stopping import follow_study, paired

from peft_vit.base.statistics import StoppingRule, follow
from peft_vit.core.config import StudyConfig
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis.studies import Study

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
    by_seed = paired(configuration(), planted.study_of(made), "lora_r4")
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
    "images of folds": (
        {"data": {"folds": 5}, "asked": "non-inferiority", "images": 900},
        StoppingRule("non-inferiority", 0.015, (2, 4, 6), correlation=600 / 512, images=900),
    ),
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


def test_balanced_accuracy_is_compared_if_it_is_asked_for() -> None:
    made = []
    for name in NAMES:
        for place, seed in enumerate(SEEDS):
            balanced = 0.6 + (0.01 * place if name == "lora_r4" else 0.0)
            whole = record(name, seed)
            test = whole.test.model_copy(update={"balanced_accuracy": balanced})
            made.append(whole.model_copy(update={"test": test}))
    by_seed = paired(configuration(metric="balanced_accuracy"), planted.study_of(made), "lora_r4")
    assert list(by_seed.values()) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
