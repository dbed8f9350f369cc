"""All pairs of experiments: against one comparison at a time, and against planted differences."""

from __future__ import annotations

import numpy as np
import planted
import pytest

from peft_vit.analysis.comparison import all_pairs
from peft_vit.records import RunRecord

EXPERIMENTS = planted.experiments()


def runs(accuracies: dict[str, list[float]]) -> list[RunRecord]:
    return [
        planted.record(EXPERIMENTS[name], seed, value)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_planted_differences_are_decided_and_the_others_are_not() -> None:
    steps = [0.0, 0.01, -0.01, 0.005, -0.005, 0.0, 0.01, -0.01]
    accuracies = {
        "linear_probe": [0.70 + s for s in steps],
        "lora_r8": [0.80 + s + 0.002 * i for i, s in enumerate(steps)],
        "full_finetuning": [0.80 + s + 0.002 * (7 - i) for i, s in enumerate(steps)],
    }
    found = all_pairs(planted.study_of(runs(accuracies)))
    verdicts = {(c.name, c.reference): c.verdict for c in (pair.comparison for pair in found.pairs)}
    assert verdicts == {
        ("linear_probe", "full_finetuning"): "refuted",
        ("linear_probe", "lora_r8"): "refuted",
        ("full_finetuning", "lora_r8"): "not decided",
    }
    assert len(found.decided) == 2


def test_effect_and_improvement_by_hand() -> None:
    differences = [0.05, 0.06, 0.04, 0.0, -0.01]
    accuracies = {"linear_probe": [0.70 + d for d in differences], "lora_r8": [0.70] * 5}
    (pair,) = all_pairs(planted.study_of(runs(accuracies))).pairs
    assert pair.effect is not None
    assert pair.effect.d == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))
    assert pair.improvement is not None
    assert pair.improvement.estimate == pytest.approx(3.5 / 5)


def test_the_family_is_all_pairs() -> None:
    found = all_pairs(planted.study_of(planted.quickstart(seeds=tuple(range(11)), spread=0.002)))
    needed = {c.significance.minimum_n for c in (pair.comparison for pair in found.pairs) if c.significance is not None}
    assert needed == {12}, "66 pairs: 66 * 2 / 2^12 <= 0.05 < 66 * 2 / 2^11"
    assert found.decided == (), "eleven seeds are one too few"


def test_too_many_pairs_are_counted_and_not_formed() -> None:
    found = all_pairs(planted.study_of(planted.quickstart()), most=65)
    assert (found.pairs, found.not_formed) == ((), 66)
    assert len(found.experiments) == 12


def test_nothing_finished_gives_no_pair() -> None:
    found = all_pairs(planted.study_of([planted.failed(EXPERIMENTS["lora_r8"], 0, "out of memory")]))
    assert (found.experiments, found.pairs, found.not_formed) == ((), (), 0)


def test_records_in_another_order_give_the_same_values() -> None:
    records = planted.quickstart(seeds=(0, 1, 2))
    assert all_pairs(planted.study_of(records)) == all_pairs(planted.study_of(records[::-1]))
