"""Tables of layers: which ones scores call important, where ranks went, how they moved, and whether that paid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peft_vit.base.statistics.estimates import known_mean
from peft_vit.deploy.page.document import Table
from peft_vit.deploy.page.formatting import count, fixed, known, number_interval, percent, plain
from peft_vit.deploy.page.tables import Column, cross_table, interval_columns, table
from peft_vit.lab.analysis import Allocation, ImportancePattern
from peft_vit.lab.analysis.comparison import SAME_SIZE
from peft_vit.lab.analysis.layers import SETTLED_AT, seed_agreements
from peft_vit.lab.report.columns import FAMILY_NOTE, OVER_SEEDS
from peft_vit.lab.report.method_tables import differences_table


def importance_tables(patterns: Sequence[ImportancePattern]) -> Iterator[Table]:
    """Yield every table of the scores of experiments, one at least."""
    yield _by_matrix(patterns)
    yield table(
        "importance_across_seeds",
        "Do seeds agree on what matters?",
        seed_agreements(patterns),
        [
            "experiment",
            "seeds",
            Column("modules", "sites"),
            Column("Kendall's W: modules", "kendalls_w", fixed),
            Column("blocks", "kendalls_w_blocks", fixed),
            Column("matrix types", "kendalls_w_matrices", fixed),
        ],
        "Kendall's coefficient of concordance of the final scores: 1 if all seeds order alike; orders drawn by "
        "chance give 1 / seeds on average. It describes these runs: the modules of one network are not "
        "independent, so there is no test. – : fewer than two seeds or three things to order.",
    )


def _heading(pattern: ImportancePattern) -> str:
    return f"{pattern.experiment.name} (n = {len(pattern.seeds)})"


def _or_dash(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else fixed(value)


def _by_matrix(patterns: Sequence[ImportancePattern]) -> Table:
    ratios = [float(np.mean(p.attention_over_mlp)) if p.attention_over_mlp else None for p in patterns]  # log2
    rows = [
        {
            "experiment": p.experiment.name,
            "matrix": matrix,
            **interval_columns("relative_score", interval),
            "log2_attention_over_mlp": ratio,
            "agreement_between_seeds": p.agreement_between_seeds,
        }
        for p, ratio in zip(patterns, ratios, strict=True)
        for matrix, interval in p.by_matrix.items()
    ]
    columns = {
        _heading(p): {
            **{matrix: number_interval(interval) for matrix, interval in p.by_matrix.items()},
            "attention / MLP": known(ratio, lambda log2: f"{fixed(2**log2)} ×"),
            "agreement of seeds": _or_dash(p.agreement_between_seeds),
        }
        for p, ratio in zip(patterns, ratios, strict=True)
    }
    return cross_table(
        "importance_by_matrix",
        "Relative score by matrix type",
        "matrix",
        columns,
        f"Final scores over the mean of their run: 1 is an average module. {OVER_SEEDS} Attention "
        "over MLP is the geometric mean over seeds; agreement is Spearman's rho of the final "
        "scores, mean over pairs of seeds.",
        keys=[str(row["matrix"]) for row in rows],
        data=rows,
    )


def study_agreement_table(agreements: Sequence[Mapping[str, Any]]) -> Table:
    """Return whether studies, with their own images, agree on which sites matter; rows of `study_agreements`."""

    def images(row: Mapping[str, Any]) -> str:
        backbone = "" if row["same_backbone"] else "; other backbones or weights"
        return " / ".join(dict.fromkeys((row["images"], row["other_images"]))) + backbone

    return table(
        "importance_across_studies",
        "Do data sets agree on what matters?",
        agreements,
        [
            Column("study", "study", plain),
            "experiment",
            Column("other study", "other_study", plain),
            Column("its experiment", "other_experiment"),
            "metric",
            Column("images", images),
            Column("modules", "sites"),
            Column("Spearman's rho", "rho", fixed),
        ],
        "Rank correlation of the mean final relative scores of the modules that both have, for experiments of one "
        "method, metric and strategy. It describes these runs; there is no test. With other backbones, modules share "
        "no more than their place.",
        data=agreements,
    )


def allocation_tables(allocations: Sequence[Allocation]) -> Iterator[Table]:
    """Yield whether adaptive ranks paid, where they went and how they moved; nothing of no experiment."""
    if not allocations:
        return
    yield differences_table(
        "allocation_against_fixed",
        "Adaptive against fixed ranks at equal trainable parameters",
        [a.against_fixed for a in allocations],
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no extrapolation; "
        f"within {100 * SAME_SIZE:.0f} % is equal). {FAMILY_NOTE}",
    )
    yield cross_table(
        "rank_by_matrix",
        "Mean final rank by matrix type",
        "matrix",
        {
            f"{a.experiment.name} (n = {len(a.runs)})": {
                matrix: number_interval(interval, 1) for matrix, interval in a.rank_by_matrix.items()
            }
            for a in allocations
        },
        f"Mean over the modules of a type. {OVER_SEEDS}",
        data=(
            {"experiment": a.experiment.name, "matrix": matrix, **interval_columns("mean_rank", interval)}
            for a in allocations
            for matrix, interval in a.rank_by_matrix.items()
        ),
    )
    yield _final_ranks(allocations)
    yield _allocation_course(allocations)


def _final_ranks(allocations: Sequence[Allocation]) -> Table:
    def of_budget(row: Mapping[str, Any]) -> str:
        if row["budget"] is None or row["unit"] == "ranks":
            return f"{row['used']} / {known(row['budget'], str)}"
        return f"{row['used']} ranks: {count(row['spent'])} / {count(row['budget'])} {row['unit']}"

    rows = [row for a in allocations for row in a.runs]
    return table(
        "allocation",
        "Final ranks and how they were reached",
        rows,
        [
            "experiment",
            "seed",
            Column("ranks / budget", of_budget),
            Column("modules without", lambda row: f"{row['sites_without_rank']} of {row['sites']}"),
            Column("Gini", "gini", fixed),
            Column("evenness", "evenness", fixed),
            Column("ranks moved at each update", "moved", lambda moved: moved.replace(" ", ", ") or "no update"),
        ],
        "Gini: 0 if all modules have the same rank, near 1 if one has all. Evenness: entropy of the ranks "
        "over its largest value, 1 if all are equal. Moved: ranks that changed their module; what the "
        "shrinking budget took does not count. Each row describes one run; there is no interval.",
        data=rows,
        folded=True,
    )


def _allocation_course(allocations: Sequence[Allocation]) -> Table:
    """Return how much moved and how early the final allocation was visible; the CSV file has every update."""
    courses = [course for a in allocations for course in a.courses]
    return table(
        "allocation_course",
        "How much moved, and how early the final ranks were in place",
        [
            {
                "experiment": first["experiment"],
                "seed": str(first["seed"]),
                "moved at an update, mean": known(known_mean(row["churn"] for row in course), percent),
                "in place at the start": known(first["overlap_with_final"], percent),
                "after half of the updates": known(
                    course[len(course) // 2]["overlap_with_final"] if updates else None, percent
                ),
                f"at least {percent(SETTLED_AT)} in place from step": known(first["settled_step"], str),
                "last update": str(updates[-1]["step"]) if updates else "no update",
            }
            for course in courses
            for first, *updates in [course]
        ],
        None,
        "Moved: ranks that changed their module, over the ranks held afterwards. In place: share of the final "
        "ranks that were where they end, both as shares of all ranks, so that a larger budget makes no "
        "difference. At the start nothing was decided, so what is in place there is what equal ranks give. One "
        "row is one run.",
        data=(row for course in courses for row in course),
        folded=True,
    )
