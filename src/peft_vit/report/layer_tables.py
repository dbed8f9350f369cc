"""Tables of layers and ranks: what a reader sees, and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vit.analysis import Allocation, ImportancePattern, RunAllocation
from peft_vit.report.document import Table
from peft_vit.report.numbers import (
    count,
    fixed,
    number_interval,
)
from peft_vit.report.tables import FAMILY_NOTE, OVER_SEEDS, differences_table, ends


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
        columns=("matrix", *(_with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
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


def _with_n(name: str, n: int) -> str:
    return f"{name} (n = {n})"


def importance_over_time_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return how early the final order of the sites was visible."""
    steps = sorted({step for p in patterns for step in p.steps})
    course = [dict(zip(p.steps, p.agreement_with_final, strict=True)) for p in patterns]
    return Table(
        slug="importance_over_time",
        title="How early the final scores were visible",
        columns=("step", *(_with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
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


def importance_by_block_table(patterns: Sequence[ImportancePattern]) -> Table:
    """Return the mean relative score of each block; the CSV file has every site."""
    blocks = sorted({block for p in patterns for block in p.grid.blocks})
    means = [dict(zip(p.grid.blocks, np.mean(p.by_block, axis=0), strict=True)) for p in patterns]
    relative = [np.mean(p.relative_final, axis=0) for p in patterns]  # (blocks, matrices) each
    return Table(
        slug="importance_by_block",
        title="Relative score by block",
        columns=("block", *(_with_n(p.experiment.name, len(p.seeds)) for p in patterns)),
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


def allocation_table(allocations: Sequence[Allocation]) -> Table:
    """Return where the budget went, how it moved, and whether it paid."""
    return Table(
        slug="allocation",
        title="Final ranks and how they were reached",
        columns=(
            "experiment",
            "seed",
            "ranks / budget",
            "sites without",
            "Gini",
            "evenness",
            "ranks moved at each update",
        ),
        rows=tuple(
            (
                a.experiment.name,
                str(run.seed),
                _ranks_and_budget(run),
                f"{run.sites_without_rank} of {run.sites}",
                "–" if run.gini is None else fixed(run.gini),
                "–" if run.entropy is None else fixed(run.entropy),
                ", ".join(str(moved) for moved in run.moved) or "no update",
            )
            for a in allocations
            for run in a.runs
        ),
        note=(
            "Gini: 0 if all sites have the same rank, near 1 if one has all. Evenness: entropy of the ranks "
            "over its largest value, 1 if all are equal. Moved: ranks that changed their site; what the "
            "shrinking budget took does not count. Each row describes one run; there is no interval."
        ),
        data=tuple(
            {
                "experiment": a.experiment.name,
                "seed": run.seed,
                "budget": run.budget,
                "unit": run.unit,
                "spent": run.spent,
                "used": run.used,
                "sites": run.sites,
                "sites_without_rank": run.sites_without_rank,
                "gini": run.gini,
                "evenness": run.entropy,
                "updates": run.updates,
                "moved": " ".join(str(moved) for moved in run.moved),
            }
            for a in allocations
            for run in a.runs
        ),
    )


def _ranks_and_budget(run: RunAllocation) -> str:
    if run.budget is None:
        return f"{run.used} / –"
    if run.unit == "ranks":
        return f"{run.used} / {run.budget}"
    return f"{run.used} ranks: {count(run.spent)} / {count(run.budget)} {run.unit}"


def allocation_value_table(allocations: Sequence[Allocation]) -> Table:
    """Return adaptive ranks against fixed ranks at equal trainable parameters."""
    note = (
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no "
        f"extrapolation). {FAMILY_NOTE}"
    )
    title = "Adaptive against fixed ranks at equal trainable parameters"
    return differences_table("allocation_against_fixed", title, [a.against_fixed for a in allocations], note)


def rank_by_matrix_table(allocations: Sequence[Allocation]) -> Table:
    """Return mean final ranks by matrix type."""
    matrices = list(dict.fromkeys(name for a in allocations for name in a.rank_by_matrix))
    return Table(
        slug="rank_by_matrix",
        title="Mean final rank by matrix type",
        columns=("matrix", *(_with_n(a.experiment.name, len(a.runs)) for a in allocations)),
        rows=tuple(
            (m, *(number_interval(i, 1) if (i := a.rank_by_matrix.get(m)) else "–" for a in allocations))
            for m in matrices
        ),
        note=f"Mean over the sites of a type. {OVER_SEEDS}",
        data=tuple(
            {"experiment": a.experiment.name, "matrix": matrix, **ends("mean_rank", interval)}
            for a in allocations
            for matrix, interval in a.rank_by_matrix.items()
        ),
    )
