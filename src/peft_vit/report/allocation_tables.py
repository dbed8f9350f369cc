"""Tables of ranks: where the budget went, how it moved, whether it paid; and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_vit.analysis import AgainstControl, Allocation, RunAllocation
from peft_vit.analysis.allocation import SETTLED_AT
from peft_vit.analysis.effectiveness import PARAMETERS
from peft_vit.analysis.limits import SAME_SIZE
from peft_vit.report.document import Block, Cell, Paragraph, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    joined,
    known,
    number_interval,
    percent,
    plain,
    points_interval,
    scaled,
)
from peft_vit.report.tables import FAMILY_NOTE, OVER_SEEDS, cell, crossed, differences_table, ends, measured, tested


def allocation_table(allocations: Sequence[Allocation]) -> Table:
    """Return where the budget went, how it moved, and whether it paid."""
    return Table.of(
        "allocation",
        "Final ranks and how they were reached",
        (
            {
                "experiment": cell("experiment", a.experiment.name),
                "seed": cell("seed", run.seed),
                "ranks / budget": Cell(
                    _ranks_and_budget(run),
                    {"budget": run.budget, "unit": run.unit, "spent": run.spent, "used": run.used},
                ),
                "sites without": Cell(
                    f"{run.sites_without_rank} of {run.sites}",
                    {"sites": run.sites, "sites_without_rank": run.sites_without_rank},
                ),
                "Gini": cell("gini", run.gini, fixed),
                "evenness": cell("evenness", run.entropy, fixed),
                "ranks moved at each update": Cell(
                    ", ".join(str(moved) for moved in run.moved) or "no update",
                    {"updates": run.updates, "moved": " ".join(str(moved) for moved in run.moved)},
                ),
            }
            for a in allocations
            for run in a.runs
        ),
        "Gini: 0 if all sites have the same rank, near 1 if one has all. Evenness: entropy of the ranks "
        "over its largest value, 1 if all are equal. Moved: ranks that changed their site; what the "
        "shrinking budget took does not count. Each row describes one run; there is no interval.",
        folded=True,
    )


def _ranks_and_budget(run: RunAllocation) -> str:
    if run.budget is None:
        return f"{run.used} / –"
    if run.unit == "ranks":
        return f"{run.used} / {run.budget}"
    return f"{run.used} ranks: {count(run.spent)} / {count(run.budget)} {run.unit}"


def allocation_course_table(allocations: Sequence[Allocation]) -> Table:
    """Return how much moved and how early the final allocation was visible; the CSV file has every update."""
    return Table.of(
        "allocation_course",
        "How much moved, and how early the final ranks stood",
        (
            {
                "experiment": a.experiment.name,
                "seed": run.seed,
                "moved at an update, mean": percent(sum(churn) / len(churn)) if churn else "–",
                "in place at the start": known(run.overlap_with_final[0], percent),
                "after half of the updates": known(
                    run.overlap_with_final[len(run.steps) // 2] if run.updates else None, percent
                ),
                f"at least {percent(SETTLED_AT)} in place from step": known(run.settled_step, str),
                "last update": run.steps[-1] if run.updates else "no update",
            }
            for a in allocations
            for run in a.runs
            for churn in ([share for share in run.churn if share is not None],)
        ),
        "Moved: ranks that changed their site, over the ranks held afterwards. In place: share of the final ranks "
        "that stood where they end, both taken as shares of all ranks, so that a larger budget is no difference. "
        "At the start nothing was decided: what is in place there is what equal ranks give. One row is one run.",
        data=(
            {
                "experiment": a.experiment.name,
                "seed": run.seed,
                "step": step,
                "moved": run.moved[i - 1] if i else None,
                "churn": run.churn[i - 1] if i else None,
                "rho_with_final": run.agreement_with_final[i],
                "overlap_with_final": run.overlap_with_final[i],
                "settled_step": run.settled_step,
            }
            for a in allocations
            for run in a.runs
            for i, step in enumerate(run.steps)
        ),
        folded=True,
    )


def control_blocks(rows: Sequence[AgainstControl]) -> Iterator[Block]:
    """Yield the comparisons with controls that the study has, and in a sentence each which it lacks."""
    if compared := [row for row in rows if row.control_experiment is not None]:
        yield _control_table(compared)
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row.control_experiment is None:
            missing.setdefault(row.accuracy.note, []).append(plain(row.experiment))
    yield from (Paragraph(f"Not compared, as {reason}: {joined(own)}.") for reason, own in missing.items())


def _control_table(rows: Sequence[AgainstControl]) -> Table:
    """Return scored ranks against ranks that look at nothing, at equal cost."""
    return Table.of(
        "allocation_against_controls",
        "Scored ranks against uniform and random ones at equal cost",
        (
            {
                "experiment": cell("experiment", r.experiment),
                "control": cell("control", r.control),
                "its experiment": Cell(
                    f"{r.control_experiment}{'' if r.same_strategy else ' (another strategy)'}",
                    {"control_experiment": r.control_experiment, "same_strategy": int(r.same_strategy)},
                ),
                "difference (points)": Cell(
                    points_interval(r.accuracy.interval), measured("difference", r.accuracy.interval)
                ),
                "n": len(r.accuracy.by_seed),
                "more accurate?": cell("verdict", r.accuracy.verdict),
                "test": Cell(tested(r.accuracy), {"p_holm": r.accuracy.adjusted_p, "note": r.accuracy.note}),
                f"points per {count(PARAMETERS)} parameters": Cell(
                    # in points, with the decimals that a thousandth of an accuracy needs
                    "not computed" if share is None else number_interval(scaled(share, 100), 4),
                    measured("per_1000_parameters", share) | {"per_1000_parameters_p_holm": r.per_parameter.adjusted_p},
                ),
                "parameters, ratio": cell("parameters_ratio", r.parameters_ratio, fixed),
            }
            for r in rows
            for share in [r.per_parameter.interval]
        ),
        "A control has the same budget, course, training and targets, but importance_metric: uniform or random. "
        "Difference in test accuracy, paired by seed, and difference in accuracy per trainable parameter, which "
        "means something only where the ratio of parameters is near 1. The exact Wilcoxon signed-rank test at 5 % "
        f"decides, with Holm's correction over the rows of one control. {OVER_SEEDS}",
    )


def allocation_value_table(allocations: Sequence[Allocation]) -> Table:
    """Return adaptive ranks against fixed ranks at equal trainable parameters."""
    note = (
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no extrapolation; "
        f"within {100 * SAME_SIZE:.0f} % is equal). {FAMILY_NOTE}"
    )
    title = "Adaptive against fixed ranks at equal trainable parameters"
    return differences_table("allocation_against_fixed", title, [a.against_fixed for a in allocations], note)


def rank_by_matrix_table(allocations: Sequence[Allocation]) -> Table:
    """Return mean final ranks by matrix type."""
    columns = {
        f"{a.experiment.name} (n = {len(a.runs)})": {
            m: number_interval(found, 1) for m, found in a.rank_by_matrix.items()
        }
        for a in allocations
    }
    return Table.of(
        "rank_by_matrix",
        "Mean final rank by matrix type",
        crossed("matrix", dict.fromkeys(matrix for of in columns.values() for matrix in of), columns),
        f"Mean over the sites of a type. {OVER_SEEDS}",
        data=(
            {"experiment": a.experiment.name, "matrix": matrix, **ends("mean_rank", interval)}
            for a in allocations
            for matrix, interval in a.rank_by_matrix.items()
        ),
    )
