"""Tables of layers and their scores: what a reader sees, and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_vit.analysis import ImportancePattern, SeedAgreement, StudyAgreement
from peft_vit.report.document import Cell, Table
from peft_vit.report.formatting import fixed, known, number_interval, plain
from peft_vit.report.tables import OVER_SEEDS, cell, crossed, ends


def _by_experiment(
    patterns: Sequence[ImportancePattern], found: Sequence[Mapping[Any, float | None]]
) -> dict[str, dict[Any, str]]:
    """Return the columns of a table with one an experiment: what was found for each, as text."""
    return {
        _heading(p): {key: _or_dash(value) for key, value in values.items()}
        for p, values in zip(patterns, found, strict=True)
    }


def _heading(pattern: ImportancePattern) -> str:
    return f"{pattern.experiment.name} (n = {len(pattern.seeds)})"


def _or_dash(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else fixed(value)


def importance_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return relative scores by matrix type, attention over MLP, and agreement between seeds."""
    ratios = [float(np.mean(p.attention_over_mlp)) if p.attention_over_mlp else None for p in patterns]  # log2
    columns = {
        _heading(p): {
            **{matrix: number_interval(interval) for matrix, interval in p.by_matrix.items()},
            "attention / MLP": known(ratio, lambda log2: f"{fixed(2**log2)} ×"),
            "agreement of seeds": _or_dash(p.agreement_between_seeds),
        }
        for p, ratio in zip(patterns, ratios, strict=True)
    }
    matrices = dict.fromkeys(name for p in patterns for name in p.by_matrix)
    return Table.of(
        "importance_by_matrix",
        "Relative score by matrix type",
        crossed("matrix", [*matrices, "attention / MLP", "agreement of seeds"], columns),
        f"Final scores over the mean of their run: 1 is an average site. {OVER_SEEDS} Attention "
        "over MLP is the geometric mean over seeds; agreement is Spearman's rho of the final "
        "scores, mean over pairs of seeds.",
        data=(
            {
                "experiment": p.experiment.name,
                "matrix": matrix,
                **ends("relative_score", interval),
                "log2_attention_over_mlp": ratio,
                "agreement_between_seeds": p.agreement_between_seeds,
            }
            for p, ratio in zip(patterns, ratios, strict=True)
            for matrix, interval in p.by_matrix.items()
        ),
    )


def importance_by_block_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the mean relative score of each block; the CSV file has every site."""
    means = [dict(zip(p.grid.blocks, np.mean(p.by_block, axis=0).tolist(), strict=True)) for p in patterns]
    relative = [np.mean(p.relative_final, axis=0) for p in patterns]  # (blocks, matrices) each
    return Table.of(
        "importance_by_block",
        "Relative score by block",
        crossed("block", sorted({block for mean in means for block in mean}), _by_experiment(patterns, means)),
        "Mean over the sites of a block and over seeds.",
        data=(
            {
                "experiment": p.experiment.name,
                "site": site.name,
                "block": site.block,
                "matrix": site.matrix,
                "mean_score": p.grid.pick(p.raw_final, site),
                "mean_relative_score": p.grid.pick(array, site),
            }
            for p, array in zip(patterns, relative, strict=True)
            for site in p.grid.sites
        ),
        folded=True,
    )


def importance_over_time_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return how early the final order of the sites was visible."""
    courses = [dict(zip(p.steps, p.agreement_with_final, strict=True)) for p in patterns]
    return Table.of(
        "importance_over_time",
        "How early the final scores were visible",
        crossed("step", sorted({step for course in courses for step in course}), _by_experiment(patterns, courses)),
        "Spearman's rho between the scores at each decision and the last ones, mean over seeds. The last "
        "row is 1 by definition.",
        data=(
            {"experiment": p.experiment.name, "step": step, "rho_with_final": rho}
            for p, course in zip(patterns, courses, strict=True)
            for step, rho in course.items()
        ),
        folded=True,
    )


def importance_course_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the relative score of each matrix type at the first, the middle and the last decision; CSV: at each."""
    matrices = list(dict.fromkeys(name for p in patterns for name in p.grid.matrices))
    courses = [
        (p, [(step, dict(zip(p.grid.matrices, row, strict=True))) for step, row in zip(p.steps, rows, strict=True)])
        for p, rows in ((p, p.matrix_course.tolist()) for p in patterns)
    ]
    return Table.of(
        "importance_course",
        "Relative score by matrix type, through training",
        (
            {"experiment": p.experiment.name, "step": str(step)} | {m: _or_dash(scores.get(m)) for m in matrices}
            for p, course in courses
            for step, scores in (course[i] for i in dict.fromkeys((0, len(course) // 2, len(course) - 1)) if course)
        ),
        "Scores of a step over their mean at that step: 1 is an average site. Mean over the sites of a type and "
        "over seeds, at the first, the middle and the last decision; the CSV file has every one.",
        data=(
            {
                "experiment": p.experiment.name,
                "step": step,
                "matrix": matrix,
                "mean_relative_score": None if np.isnan(value) else value,
            }
            for p, course in courses
            for step, scores in course
            for matrix, value in scores.items()
        ),
        folded=True,
    )


def seed_agreement_table(agreements: Sequence[SeedAgreement]) -> Table:
    """Return whether seeds agree on which sites, blocks and matrix types matter."""
    return Table.of(
        "importance_across_seeds",
        "Do seeds agree on what matters?",
        (
            {
                "experiment": cell("experiment", a.experiment.name),
                "seeds": cell("seeds", a.seeds),
                "sites": cell("sites", a.sites),
                "Kendall's W: sites": cell("kendalls_w", a.w, fixed),
                "blocks": cell("kendalls_w_blocks", a.by_block, fixed),
                "matrix types": cell("kendalls_w_matrices", a.by_matrix, fixed),
            }
            for a in agreements
        ),
        "Kendall's coefficient of concordance of the final scores: 1 if all seeds order alike; orders drawn by "
        "chance give 1 / seeds on average. It describes these runs: the sites of one network are no independent "
        "draws, so there is no test. – : fewer than two seeds or three things to order.",
    )


def study_agreement_table(agreements: Sequence[StudyAgreement]) -> Table:
    """Return whether studies, with their own images, agree on which sites matter."""
    return Table.of(
        "importance_across_studies",
        "Do data sets agree on what matters?",
        (
            {
                "study": cell("study", a.study, plain),
                "experiment": cell("experiment", a.experiment),
                "other study": cell("other_study", a.other, plain),
                "its experiment": cell("other_experiment", a.other_experiment),
                "metric": cell("metric", a.metric),
                "images": Cell(
                    " / ".join(dict.fromkeys((a.images, a.other_images)))
                    + ("" if a.same_backbone else "; other backbones or weights"),
                    {"images": a.images, "other_images": a.other_images, "same_backbone": int(a.same_backbone)},
                ),
                "sites": cell("sites", a.sites),
                "Spearman's rho": cell("rho", a.rho, fixed),
            }
            for a in agreements
        ),
        "Rank correlation of the mean final relative scores of the sites that both have, for experiments of one "
        "method, metric and strategy. It describes these runs; there is no test. With other backbones, sites share "
        "no more than their place.",
    )
