"""Agreement of importance over seeds and over studies, against the textbook formula and planted orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import planted
import pytest
from scipy import stats

from peft_vit.analysis.importance import importance_patterns, kendalls_w, seed_agreements, study_agreements
from peft_vit.records import ImportanceEntry, RunRecord

EXPERIMENTS = planted.experiments()
ADALORA = EXPERIMENTS["adalora_proportional_magnitude"]
NAMES = [site.name for site in planted.sites()]


def by_formula(scores: np.ndarray) -> float:
    """Kendall and Babington Smith, word by word, ties corrected."""
    m, n = scores.shape
    ranks = np.array([stats.rankdata(row) for row in scores])
    sums = ranks.sum(axis=0)
    s = ((sums - sums.mean()) ** 2).sum()
    t = sum((np.unique(row, return_counts=True)[1] ** 3 - np.unique(row, return_counts=True)[1]).sum() for row in ranks)
    return float(12 * s / (m**2 * (n**3 - n) - m * t))


@pytest.mark.parametrize("ties", [False, True])
def test_w_by_the_formula(ties: bool) -> None:
    scores = np.random.default_rng(1).normal(size=(5, 12))
    if ties:
        scores = np.round(scores)
    assert kendalls_w(scores) == pytest.approx(by_formula(scores), abs=1e-12)


@pytest.mark.parametrize("scores", [[[1, 2, 3]], [[1, 2], [2, 1]], [[1, 2, 3], [1, 1, 1]]])
def test_too_few_or_constant_scores_have_no_w(scores: list[list[float]]) -> None:
    assert kendalls_w(scores) is None


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        kendalls_w([[1, 2, float("nan")], [1, 2, 3]])


def test_scores_of_a_matrix_type_over_time() -> None:
    """Query is twice, then four times an average site of the other five types."""
    weights = (np.array([2.0, 1, 1, 1, 1, 1]), np.array([4.0, 1, 1, 1, 1, 1]))
    entries = [
        ImportanceEntry(step=12 * (i + 1), scores=dict(zip(NAMES, np.tile(weight, 12).tolist(), strict=True)))
        for i, weight in enumerate(weights)
    ]
    records = [planted.record(ADALORA, seed, 0.8, changes={"importance_history": entries}) for seed in (0, 1)]
    study = planted.study_of(records)
    (pattern,) = importance_patterns(study)
    assert pattern.steps == (12, 24)
    np.testing.assert_allclose(pattern.matrix_course[:, 0], [2 / (7 / 6), 4 / (9 / 6)], rtol=1e-12)
    np.testing.assert_allclose(pattern.matrix_course[:, 5], [1 / (7 / 6), 1 / (9 / 6)], rtol=1e-12)


def scored(seed: int, values: np.ndarray, *, study: str = "one", **options: Any) -> RunRecord:
    entry = ImportanceEntry(step=12, scores=dict(zip(NAMES, values.tolist(), strict=True)))
    return planted.record(
        ADALORA,
        seed,
        0.8,
        study=study,
        changes={"importance_history": [entry], **options.pop("changes", {})},
        **options,
    )


def test_seeds_that_agree_by_block_but_not_within() -> None:
    rng = np.random.default_rng(3)
    blocks = np.repeat(np.arange(1.0, 13.0), 6)  # the order of sites
    rows = [blocks * 100 + np.tile(rng.permutation(6), 12) for _ in range(3)]
    study = planted.study_of([scored(seed, row) for seed, row in enumerate(rows)])
    (one,) = seed_agreements(importance_patterns(study))
    assert (one["seeds"], one["sites"]) == (3, 72)
    assert one["kendalls_w_blocks"] == pytest.approx(1)
    assert one["kendalls_w"] == pytest.approx(by_formula(np.array(rows)), abs=1e-12)
    by_matrix = np.array(rows).reshape(3, 12, 6).mean(axis=1)
    assert one["kendalls_w_matrices"] == pytest.approx(by_formula(by_matrix), abs=1e-9)


def test_one_seed_agrees_with_nobody() -> None:
    study = planted.study_of([scored(0, np.arange(1.0, 73.0))])
    (one,) = seed_agreements(importance_patterns(study))
    assert [one[key] for key in ("kendalls_w", "kendalls_w_blocks", "kendalls_w_matrices")] == [None] * 3


def agreements(records: list[RunRecord]) -> list[dict[str, Any]]:
    return study_agreements([(study, importance_patterns(study)) for study in planted.studies_of(records)])


def test_two_studies_are_set_side_by_side() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random((2, 72)) + 0.1, rng.random((3, 72)) + 0.1
    records = [scored(seed, row) for seed, row in enumerate(first)]
    records += [scored(seed, row, study="two") for seed, row in enumerate(second)]
    (one,) = agreements(records)
    means = [np.mean([row / row.mean() for row in rows], axis=0) for rows in (first, second)]
    assert one["rho"] == pytest.approx(stats.spearmanr(*means).statistic, abs=1e-12)
    assert [one[key] for key in ("study", "other_study", "sites", "metric")] == ["one", "two", 72, "magnitude"]
    assert one["same_backbone"]


def test_another_backbone_is_said() -> None:
    values = np.arange(1.0, 73.0)
    (one,) = agreements(
        [scored(0, values), scored(0, values, study="two", provenance_changes={"weights_sha256": "f" * 64})]
    )
    assert not one["same_backbone"]
    assert one["rho"] == pytest.approx(1)


def test_other_metrics_and_smoke_runs_are_not_set_against_each_other() -> None:
    values = np.arange(1.0, 73.0)
    assert agreements([scored(0, values), scored(0, values, study="two", smoke=True)]) == []
    other = planted.record(EXPERIMENTS["adalora_top_k_fisher"], 0, 0.8, study="two")
    assert agreements([scored(0, values), other]) == []
    same_study = planted.record(EXPERIMENTS["adalora_top_k_fisher"], 0, 0.8, study="one")
    assert agreements([scored(0, values), same_study]) == []
