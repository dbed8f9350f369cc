"""Importance of layers, and its agreement over seeds and studies: planted scores."""

from typing import Any

import numpy as np
import planted
import pytest

from peft_vit.core.records import ImportanceEntry, RunRecord, SiteInfo
from peft_vit.lab.analysis.layers import ImportancePattern, importance_patterns
from peft_vit.lab.report.figures import importance_maps

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
    assert pattern.attention_over_mlp == pytest.approx({0: 2.0, 1: 2.0}), "attention is four times the MLP"
    # Four types of weight 4 and two of weight 1: mean 3.
    relative = np.array([pattern.relative[site] for *_, site in pattern.grid.cells()]).reshape(12, 6)
    by_matrix = dict(zip(pattern.grid.matrices, relative.mean(axis=0), strict=True))
    assert (by_matrix["query"], by_matrix["fc1"]) == pytest.approx((4 / 3, 1 / 3))
    assert np.diff(relative.mean(axis=1)) == pytest.approx(np.full(11, 1 / 6.5)), "block i weighs i + 1"
    assert pattern.between_seeds == {"0-1": pytest.approx(1.0)}


def test_the_unit_of_the_scores_does_not_matter() -> None:
    small = [ImportanceEntry(step=12, scores=planted.scores_at(36, 0, factor=1e-9))]
    pattern = pattern_of(planted.record(ADALORA, 0, 0.8, changes={"importance_history": small}))
    other = pattern_of(planted.record(ADALORA, 0, 0.8))
    assert pattern.relative == pytest.approx(other.relative, rel=1e-12)


def test_scores_of_some_matrices_only_or_of_none() -> None:
    attention = {name: 1.0 for name in NAMES if "attn" in name}
    record = planted.record(
        ADALORA, 0, 0.8, changes={"importance_history": [ImportanceEntry(step=36, scores=attention)]}
    )
    pattern = pattern_of(record)
    assert pattern.grid.matrices == ("query", "key", "value", "out")
    assert pattern.attention_over_mlp == {}
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
    assert [block for block, matrix, site in pattern.grid.cells() if matrix == "reduction" and site] == [1]
    assert pattern.attention_over_mlp == pytest.approx({0: 2.0})
    drawing = importance_maps([pattern], "")
    assert drawing.caption.endswith("Grey: the block has no such matrix.")
    assert "Grey" not in importance_maps([pattern_of(plain)], "").caption
    empty = [point.text for point in drawing.points if "no such matrix" in point.text]
    assert empty == [f"block {block}, reduction\nno such matrix in this block" for block in range(12) if block != 1]


# --- agreement --------------------------------------------------------------------------------------------------------


def test_seeds_are_compared_in_pairs_that_share_no_run() -> None:
    rows = [SITE_ORDER, SITE_ORDER[::-1], SITE_ORDER, SITE_ORDER, SITE_ORDER]
    assert pattern_of(*(scored(seed, row) for seed, row in enumerate(rows))).between_seeds == {"0-1": -1.0, "2-3": 1.0}
    other = scored(1, SITE_ORDER, provenance_changes={"weights_sha256": "f" * 64})
    assert pattern_of(scored(0, SITE_ORDER), other).between_seeds == {}
