"""Tables of layers and their scores: what a reader sees, and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vit.analysis import ImportancePattern, SeedAgreement, StudyAgreement
from peft_vit.report.document import Cell, Table
from peft_vit.report.formatting import fixed, number_interval, plain
from peft_vit.report.tables import OVER_SEEDS, ends, number_cell, text_cell, with_n


def importance_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return relative scores by matrix type, attention over MLP, and agreement between seeds."""
    headings = [with_n(p.experiment.name, len(p.seeds)) for p in patterns]
    rows = {
        matrix: [number_interval(i) if (i := p.by_matrix.get(matrix)) else "–" for p in patterns]
        for matrix in dict.fromkeys(name for p in patterns for name in p.by_matrix)
    }
    rows["attention / MLP"] = [
        f"{fixed(2 ** float(np.mean(p.attention_over_mlp)))} ×" if p.attention_over_mlp else "–" for p in patterns
    ]
    rows["agreement of seeds"] = [_or_dash(p.agreement_between_seeds) for p in patterns]
    return Table.of(
        "importance_by_matrix",
        "Relative score by matrix type",
        ({"matrix": name} | dict(zip(headings, texts, strict=True)) for name, texts in rows.items()),
        f"Final scores over the mean of their run: 1 is an average site. {OVER_SEEDS} Attention "
        "over MLP is the geometric mean over seeds; agreement is Spearman's rho of the final "
        "scores, mean over pairs of seeds.",
        data=(
            {
                "experiment": p.experiment.name,
                "matrix": matrix,
                **ends("relative_score", interval),
                "log2_attention_over_mlp": float(np.mean(p.attention_over_mlp)) if p.attention_over_mlp else None,
                "agreement_between_seeds": p.agreement_between_seeds,
            }
            for p in patterns
            for matrix, interval in p.by_matrix.items()
        ),
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else fixed(value)


def importance_over_time_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return how early the final order of the sites was visible."""
    steps = sorted({step for p in patterns for step in p.steps})
    course = [dict(zip(p.steps, p.agreement_with_final, strict=True)) for p in patterns]
    headings = [with_n(p.experiment.name, len(p.seeds)) for p in patterns]
    return Table.of(
        "importance_over_time",
        "How early the final scores were visible",
        (
            {"step": str(step)}
            | {heading: _or_dash(one.get(step)) for heading, one in zip(headings, course, strict=True)}
            for step in steps
        ),
        "Spearman's rho between the scores at each decision and the last ones, mean over seeds. The last "
        "row is 1 by definition.",
        data=(
            {"experiment": p.experiment.name, "step": step, "rho_with_final": rho}
            for p, one in zip(patterns, course, strict=True)
            for step, rho in one.items()
        ),
    )


def importance_course_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the relative score of each matrix type at the first, the middle and the last decision; CSV: at each."""
    matrices = list(dict.fromkeys(name for p in patterns for name in p.grid.matrices))
    shown = [(p, i) for p in patterns for i in dict.fromkeys((0, len(p.steps) // 2, len(p.steps) - 1)) if p.steps]
    return Table.of(
        "importance_course",
        "Relative score by matrix type, through training",
        (
            {"experiment": p.experiment.name, "step": str(p.steps[i])} | {name: _at(p, i, name) for name in matrices}
            for p, i in shown
        ),
        "Scores of a step over their mean at that step: 1 is an average site. Mean over the sites of a type and "
        "over seeds, at the first, the middle and the last decision; the CSV file has every one.",
        data=(
            {"experiment": p.experiment.name, "step": step, "matrix": matrix, "mean_relative_score": _known(value)}
            for p in patterns
            for step, row in zip(p.steps, p.matrix_course.tolist(), strict=True)
            for matrix, value in zip(p.grid.matrices, row, strict=True)
        ),
    )


def _at(pattern: ImportancePattern, step: int, matrix: str) -> str:
    if matrix not in pattern.grid.matrices:
        return "–"
    return _or_dash(_known(float(pattern.matrix_course[step, pattern.grid.matrices.index(matrix)])))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def seed_agreement_table(agreements: Sequence[SeedAgreement]) -> Table:
    """Return whether seeds agree on which sites, blocks and matrix types matter."""
    return Table.of(
        "importance_across_seeds",
        "Do seeds agree on what matters?",
        (
            {
                "experiment": text_cell("experiment", a.experiment.name),
                "seeds": number_cell("seeds", a.seeds),
                "sites": number_cell("sites", a.sites),
                "Kendall's W: sites": number_cell("kendalls_w", a.w, fixed),
                "blocks": number_cell("kendalls_w_blocks", a.by_block, fixed),
                "matrix types": number_cell("kendalls_w_matrices", a.by_matrix, fixed),
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
                "study": Cell(plain(a.study), {"study": a.study}),
                "experiment": text_cell("experiment", a.experiment),
                "other study": Cell(plain(a.other), {"other_study": a.other}),
                "its experiment": text_cell("other_experiment", a.other_experiment),
                "metric": text_cell("metric", a.metric),
                "images": Cell(
                    (a.images if a.images == a.other_images else f"{a.images} / {a.other_images}")
                    + ("" if a.same_backbone else "; other backbones or weights"),
                    {"images": a.images, "other_images": a.other_images, "same_backbone": int(a.same_backbone)},
                ),
                "sites": number_cell("sites", a.sites),
                "Spearman's rho": number_cell("rho", a.rho, fixed),
            }
            for a in agreements
        ),
        "Rank correlation of the mean final relative scores of the sites that both have, for experiments of one "
        "method, metric and strategy. It describes these runs; there is no test. With other backbones, sites share "
        "no more than their place.",
    )


def importance_by_block_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the mean relative score of each block; the CSV file has every site."""
    blocks = sorted({block for p in patterns for block in p.grid.blocks})
    means = [dict(zip(p.grid.blocks, np.mean(p.by_block, axis=0), strict=True)) for p in patterns]
    relative = [np.mean(p.relative_final, axis=0) for p in patterns]  # (blocks, matrices) each
    headings = [with_n(p.experiment.name, len(p.seeds)) for p in patterns]
    return Table.of(
        "importance_by_block",
        "Relative score by block",
        (
            {"block": str(b)} | {heading: _or_dash(mean.get(b)) for heading, mean in zip(headings, means, strict=True)}
            for b in blocks
        ),
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
    )
