"""Importance of layers, and its agreement over seeds and studies: planted scores, and the textbook's formula."""

from typing import Any

import numpy as np
import planted
import pytest
from scipy import stats

from peft_vit.core.records import ImportanceEntry, RunRecord, SiteInfo
from peft_vit.lab.analysis.layers import (
    ImportancePattern,
    importance_patterns,
    kendalls_w,
    seed_agreements,
    study_agreements,
)
from peft_vit.lab.report.heatmaps import importance_maps

EXPERIMENTS = planted.experiments()
ADALORA = EXPERIMENTS["adalora_proportional_magnitude"]
NAMES = [site.name for site in planted.sites()]
SITE_ORDER = np.arange(1.0, 73.0)


def scored(seed: int, *values: Any, study: str = "one", **options: Any) -> RunRecord:
    """Return a run with these scores of its sites, at step 12, 24, ..."""
    entries = [
        ImportanceEntry(step=12 * i, scores=dict(zip(NAMES, map(float, scores), strict=True)))
        for i, scores in enumerate(values, start=1)
    ]
    return planted.record(ADALORA, seed, 0.8, study=study, changes={"importance_history": entries}, **options)


def pattern_of(*records: RunRecord) -> ImportancePattern:
    (pattern,) = importance_patterns(planted.study_of(list(records)))
    return pattern


def test_planted_importance_is_found() -> None:
    pattern = importance_patterns(planted.study_of(planted.quickstart()))[0]
    assert pattern.attention_over_mlp == pytest.approx((2.0, 2.0)), "attention is four times the MLP"
    # Four types of weight 4 and two of weight 1: mean 3.
    assert pattern.by_matrix["query"].estimate == pytest.approx(4 / 3)
    assert pattern.by_matrix["fc1"].estimate == pytest.approx(1 / 3)
    assert np.diff(np.mean(pattern.relative_final, axis=(0, 2))) == pytest.approx(np.full(11, 1 / 6.5)), (
        "block i weighs i + 1"
    )
    assert pattern.agreement_between_seeds == pytest.approx(1.0)


def test_neither_the_unit_of_the_scores_matters_nor_does_one_seed_agree_with_another() -> None:
    small = [ImportanceEntry(step=12, scores=planted.scores_at(36, 0, factor=1e-9))]
    pattern = pattern_of(planted.record(ADALORA, 0, 0.8, changes={"importance_history": small}))
    other = pattern_of(planted.record(ADALORA, 0, 0.8))
    np.testing.assert_allclose(pattern.relative_final, other.relative_final, rtol=1e-12)
    assert (pattern.agreement_between_seeds, pattern.by_matrix["query"].low) == (None, None)
    (row,) = seed_agreements([pattern])
    assert [row[key] for key in ("kendalls_w", "kendalls_w_blocks", "kendalls_w_matrices")] == [None] * 3


def test_scores_of_some_matrices_only_or_of_none() -> None:
    attention = {name: 1.0 for name in NAMES if "attn" in name}
    record = planted.record(
        ADALORA, 0, 0.8, changes={"importance_history": [ImportanceEntry(step=36, scores=attention)]}
    )
    pattern = pattern_of(record)
    assert pattern.grid.matrices == ("query", "key", "value", "out")
    assert pattern.attention_over_mlp == ()
    assert importance_patterns(planted.study_of([scored(0, np.zeros(72))])) == ()


def test_a_matrix_of_some_blocks_only_counts_neither_as_attention_nor_as_mlp() -> None:
    """As Swin's, which merges patches between stages."""
    merge = SiteInfo(name="merge", block=1, matrix="reduction", role="other", in_features=4, out_features=2)
    plain = planted.record(ADALORA, 0, 0.8)
    entries = [
        entry.model_copy(update={"scores": {**entry.scores, "merge": 1e3}}) for entry in plain.importance_history
    ]
    pattern = pattern_of(plain.model_copy(update={"importance_history": entries, "sites": [*plain.sites, merge]}))
    assert pattern.grid.matrices[-1] == "reduction"
    assert np.isfinite(pattern.relative_final[0, :, -1]).tolist() == [block == 1 for block in range(12)]
    assert pattern.attention_over_mlp == pytest.approx((2.0,))
    drawing = importance_maps([pattern])
    assert drawing.caption.endswith("Grey: the block has no such matrix.")
    assert "Grey" not in importance_maps([pattern_of(plain)]).caption
    empty = [point.text for point in drawing.points if "no such matrix" in point.text]
    assert empty == [f"block {block}, reduction\nno such matrix in this block" for block in range(12) if block != 1]


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "w"),
    [
        ([[1, 2, 3]], None),
        ([[1, 2], [2, 1]], None),
        ([[1, 2, 3], [1, 1, 1]], None),
        # Sums of ranks 2, 5.5, 4.5, 8 about their mean 5: S = 18.5; of one tie 2^3 - 2: 12 S / (4 * 60 - 2 * 6)
        ([[1, 2, 2, 9], [2, 4, 3, 5]], 12 * 18.5 / 228),
    ],
)
def test_w_by_hand_and_where_there_is_none(scores, w) -> None:
    assert kendalls_w(scores) == (None if w is None else pytest.approx(w, abs=1e-12))


def test_seeds_that_agree_by_block_but_not_within() -> None:
    """Where nothing ties, W follows from the mean Spearman correlation of all pairs: (1 + (m - 1) rho) / m."""
    rng = np.random.default_rng(3)
    blocks = np.repeat(np.arange(1.0, 13.0), 6)  # the order of sites
    rows = np.array([blocks * 100 + np.tile(rng.permutation(6), 12) for _ in range(3)])
    (row_,) = seed_agreements([pattern_of(*(scored(seed, row) for seed, row in enumerate(rows)))])
    sites, matrices = (
        (1 + 2 * np.mean(stats.spearmanr(values.T).statistic[np.triu_indices(3, 1)])) / 3
        for values in (rows, rows.reshape(3, 12, 6).mean(axis=1))
    )
    assert row_ == {
        "experiment": ADALORA.name,
        "seeds": 3,
        "sites": 72,
        "kendalls_w": pytest.approx(sites, abs=1e-9),
        "kendalls_w_blocks": pytest.approx(1),
        "kendalls_w_matrices": pytest.approx(matrices, abs=1e-9),
    }


def agreements(*records: RunRecord) -> list[dict[str, Any]]:
    return study_agreements([(study, importance_patterns(study)) for study in planted.studies_of(list(records))])


def test_two_studies_are_set_side_by_side() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random((2, 72)) + 0.1, rng.random((3, 72)) + 0.1
    (agreement,) = agreements(
        *(scored(seed, row) for seed, row in enumerate(first)),
        *(scored(seed, row, study="two") for seed, row in enumerate(second)),
    )
    means = [np.mean([row / row.mean() for row in rows], axis=0) for rows in (first, second)]
    assert agreement["rho"] == pytest.approx(stats.spearmanr(*means).statistic, abs=1e-12)
    keys = ("study", "other_study", "sites", "metric", "same_backbone")
    assert [agreement[key] for key in keys] == ["one", "two", 72, "magnitude", 1]


def test_another_backbone_is_said_and_other_metrics_and_smoke_runs_make_no_row() -> None:
    here = scored(0, SITE_ORDER)
    (other,) = agreements(here, scored(0, SITE_ORDER, study="two", provenance_changes={"weights_sha256": "f" * 64}))
    assert (other["same_backbone"], other["rho"]) == (0, pytest.approx(1))
    assert agreements(here, scored(0, SITE_ORDER, study="two", smoke=True)) == []
    for study in ("one", "two"):
        assert agreements(here, planted.record(EXPERIMENTS["adalora_top_k_fisher"], 0, 0.8, study=study)) == []
