"""Tables of layers and their scores: what a reader sees, and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vit.analysis import ImportancePattern, SeedAgreement, StudyAgreement
from peft_vit.report.document import Table
from peft_vit.report.numbers import fixed, number_interval, plain
from peft_vit.report.tables import OVER_SEEDS, ends, with_n


def importance_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return relative scores by matrix type, attention over MLP, and agreement between seeds."""
    matrices = list(dict.fromkeys(name for p in patterns for name in p.by_matrix))
    ratios = [
        f"{fixed(2 ** float(np.mean(p.attention_over_mlp)))} ×" if p.attention_over_mlp else "–" for p in patterns
    ]
    agreement = ["–" if (rho := p.agreement_between_seeds) is None else fixed(rho) for p in patterns]
    return Table(
        slug="importance_by_matrix",
        title="Relative score by matrix type",
        columns=("matrix", *(with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
        rows=(
            *((m, *(number_interval(i) if (i := p.by_matrix.get(m)) else "–" for p in patterns)) for m in matrices),
            ("attention / MLP", *ratios),
            ("agreement of seeds", *agreement),
        ),
        note=(
            f"Final scores over the mean of their run: 1 is an average site. {OVER_SEEDS} Attention "
            "over MLP is the geometric mean over seeds; agreement is Spearman's rho of the final "
            "scores, mean over pairs of seeds."
        ),
        data=tuple(
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


def importance_over_time_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return how early the final order of the sites was visible."""
    steps = sorted({step for p in patterns for step in p.steps})
    course = [dict(zip(p.steps, p.agreement_with_final, strict=True)) for p in patterns]
    return Table(
        slug="importance_over_time",
        title="How early the final scores were visible",
        columns=("step", *(with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
        rows=tuple(
            (str(step), *("–" if (rho := one.get(step)) is None else fixed(rho) for one in course)) for step in steps
        ),
        note=(
            "Spearman's rho between the scores at each decision and the last ones, mean over seeds. The last "
            "row is 1 by definition."
        ),
        data=tuple(
            {"experiment": p.experiment.name, "step": step, "rho_with_final": rho}
            for p, one in zip(patterns, course, strict=True)
            for step, rho in one.items()
        ),
    )


def importance_course_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the relative score of each matrix type at the first, the middle and the last decision; CSV: at each."""
    matrices = list(dict.fromkeys(name for p in patterns for name in p.grid.matrices))
    shown = [(p, i) for p in patterns for i in dict.fromkeys((0, len(p.steps) // 2, len(p.steps) - 1)) if p.steps]
    return Table(
        slug="importance_course",
        title="Relative score by matrix type, through training",
        columns=("experiment", "step", *matrices),
        rows=tuple((p.experiment.name, str(p.steps[i]), *(_at(p, i, matrix) for matrix in matrices)) for p, i in shown),
        note=(
            "Scores of a step over their mean at that step: 1 is an average site. Mean over the sites of a type and "
            "over seeds, at the first, the middle and the last decision; the CSV file has every one."
        ),
        data=tuple(
            {"experiment": p.experiment.name, "step": step, "matrix": matrix, "mean_relative_score": _known(value)}
            for p in patterns
            for step, row in zip(p.steps, p.matrix_course.tolist(), strict=True)
            for matrix, value in zip(p.grid.matrices, row, strict=True)
        ),
    )


def _at(pattern: ImportancePattern, step: int, matrix: str) -> str:
    if matrix not in pattern.grid.matrices:
        return "–"
    value = _known(float(pattern.matrix_course[step, pattern.grid.matrices.index(matrix)]))
    return "–" if value is None else fixed(value)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def seed_agreement_table(agreements: Sequence[SeedAgreement]) -> Table:
    """Return whether seeds agree on which sites, blocks and matrix types matter."""
    return Table(
        slug="importance_across_seeds",
        title="Do seeds agree on what matters?",
        columns=("experiment", "seeds", "sites", "Kendall's W: sites", "blocks", "matrix types"),
        rows=tuple(
            (a.experiment.name, str(a.seeds), str(a.sites), _w(a.w), _w(a.by_block), _w(a.by_matrix))
            for a in agreements
        ),
        note=(
            "Kendall's coefficient of concordance of the final scores: 1 if all seeds order alike; orders drawn by "
            "chance give 1 / seeds on average. It describes these runs: the sites of one network are no independent "
            "draws, so there is no test. – : fewer than two seeds or three things to order."
        ),
        data=tuple(
            {
                "experiment": a.experiment.name,
                "seeds": a.seeds,
                "sites": a.sites,
                "kendalls_w": a.w,
                "kendalls_w_blocks": a.by_block,
                "kendalls_w_matrices": a.by_matrix,
            }
            for a in agreements
        ),
    )


def _w(value: float | None) -> str:
    return "–" if value is None else fixed(value)


def study_agreement_table(agreements: Sequence[StudyAgreement]) -> Table:
    """Return whether studies, with their own images, agree on which sites matter."""
    return Table(
        slug="importance_across_studies",
        title="Do data sets agree on what matters?",
        columns=("study", "experiment", "other study", "its experiment", "metric", "images", "sites", "Spearman's rho"),
        rows=tuple(
            (
                plain(a.study),
                a.experiment,
                plain(a.other),
                a.other_experiment,
                a.metric,
                (a.images if a.images == a.other_images else f"{a.images} / {a.other_images}")
                + ("" if a.same_backbone else "; other backbones or weights"),
                str(a.sites),
                _w(a.rho),
            )
            for a in agreements
        ),
        note=(
            "Rank correlation of the mean final relative scores of the sites that both have, for experiments of one "
            "method, metric and strategy. It describes these runs; there is no test. With other backbones, sites share "
            "no more than their place."
        ),
        data=tuple(
            {
                "study": a.study,
                "experiment": a.experiment,
                "other_study": a.other,
                "other_experiment": a.other_experiment,
                "metric": a.metric,
                "images": a.images,
                "other_images": a.other_images,
                "same_backbone": int(a.same_backbone),
                "sites": a.sites,
                "rho": a.rho,
            }
            for a in agreements
        ),
    )


def importance_by_block_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the mean relative score of each block; the CSV file has every site."""
    blocks = sorted({block for p in patterns for block in p.grid.blocks})
    means = [dict(zip(p.grid.blocks, np.mean(p.by_block, axis=0), strict=True)) for p in patterns]
    relative = [np.mean(p.relative_final, axis=0) for p in patterns]  # (blocks, matrices) each
    return Table(
        slug="importance_by_block",
        title="Relative score by block",
        columns=("block", *(with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
        rows=tuple((str(b), *(fixed(mean[b]) if b in mean else "–" for mean in means)) for b in blocks),
        note="Mean over the sites of a block and over seeds.",
        data=tuple(
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
