"""From an analysis to the report of one study: which table and figure stands where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from peft_vit.analysis import Analysis, FisherAgreement, StudyAgreement, study_agreements
from peft_vit.report import (
    allocation_tables,
    calibration_tables,
    findings_tables,
    layer_tables,
    pair_tables,
    quantization_tables,
    size_tables,
    summary,
    tables,
)
from peft_vit.report.document import SECTION_TITLES, Block, Paragraph, StudyDocument, Table
from peft_vit.report.examples import Thumbnails, example_blocks
from peft_vit.report.figures import allocation_figures, comparison_figures, importance_figures
from peft_vit.report.forest_plot import forests
from peft_vit.report.formatting import counted, fixed, joined, plain
from peft_vit.report.pareto_plot import pareto_panels
from peft_vit.report.plot_selection import validation_means
from peft_vit.report.progress import progress
from peft_vit.report.reliability import reliability_diagram

# What a reader looks up rather than reads: it stands behind a table or a figure that is always shown.
FOLDED = frozenset(
    {
        "pareto_fronts",
        "quality",
        "calibration",
        "reliability",
        "convergence",
        "examples",
        "importance_by_block",
        "importance_over_time",
        "importance_course",
        "allocation",
        "allocation_course",
        "size_parts",
        "bits_by_layer",
        "quantization_balance",
        "findings",
        "without_data",
    }
)


def study_documents(analyses: Sequence[Analysis], thumbnails: Thumbnails | None = None) -> tuple[StudyDocument, ...]:
    """Return one document a study, each with a slug of its own; `thumbnails` gets pictures of test images."""
    taken: set[str] = set()
    documents = []
    agreements = study_agreements([(analysis.study, analysis.importance) for analysis in analyses])
    for analysis in analyses:
        base = slug = slug_of(analysis.study.label)
        number = 2
        while slug in taken:
            slug, number = f"{base}_{number}", number + 1
        taken.add(slug)
        mine = [a for a in agreements if analysis.study.label in (a.study, a.other)]
        documents.append(_document(analysis, slug, mine, thumbnails))
    return tuple(documents)


def slug_of(name: str) -> str:
    """Return a name that is safe as part of a file name and of an anchor."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:64] or "study"


def _document(
    analysis: Analysis, slug: str, agreements: Sequence[StudyAgreement], thumbnails: Thumbnails | None
) -> StudyDocument:
    study = analysis.study
    methods = (*_methods(analysis), *example_blocks(analysis, thumbnails))
    contents = (_importance(analysis, agreements), _allocation(analysis), _quantization(analysis), methods)
    shown = [[_folded(block) for block in blocks] for blocks in (*contents, _insights(analysis))]
    sections = dict(zip(SECTION_TITLES, map(tuple, shown), strict=True))
    return StudyDocument(
        label=plain(study.label),
        slug=slug,
        notices=tuple(plain(notice) for notice in study.notices),
        facts=summary.facts(study),
        cards=summary.cards(analysis.methods),
        came_out=summary.came_out(analysis),
        how_sure=summary.how_sure(analysis),
        progress=progress(study),
        sections=sections if study.runs else dict.fromkeys(SECTION_TITLES, ()),
        not_shown=summary.not_shown(study),
        runs=summary.run_details(study),
    )


def _folded(block: Block) -> Block:
    if isinstance(block, Table) and (block.slug in FOLDED or block.slug.startswith("calibration_against_")):
        return replace(block, folded=True)
    return block


def _importance(analysis: Analysis, agreements: Sequence[StudyAgreement]) -> tuple[Block, ...]:
    figures = importance_figures(analysis)
    across = [layer_tables.study_agreement_table(agreements)] if agreements else []
    fisher = tuple(Paragraph(_fisher_line(agreement)) for agreement in analysis.fisher)
    if not analysis.importance:
        return (*figures, *fisher)
    patterns = analysis.importance
    return (
        *figures,
        *fisher,
        layer_tables.importance_table(patterns),
        layer_tables.importance_by_block_table(patterns),
        layer_tables.importance_over_time_table(patterns),
        layer_tables.importance_course_table(patterns),
        layer_tables.seed_agreement_table(analysis.seed_agreements),
        *across,
    )


def _fisher_line(agreement: FisherAgreement) -> str:
    """Return how far the score `fisher` is from what it stands in for."""
    rhos = agreement.rhos
    images = joined(str(count) for count in sorted({check.images for check in agreement.checks}))
    sites = sorted({len(check.minibatch) for check in agreement.checks})
    found = "undefined, one of both is constant"
    if rhos:
        found = fixed(fmean(rhos)) + (f" (from {fixed(min(rhos))} to {fixed(max(rhos))})" if len(rhos) > 1 else "")
    return (
        f"{plain(agreement.experiment.name)}: the score fisher (minibatch empirical Fisher) against the per-sample "
        f"empirical Fisher of the same {images} training images after training, Spearman's rho over the "
        f"{'–'.join(str(count) for count in dict.fromkeys((sites[0], sites[-1])))} sites with rank: {found}, "
        f"{counted(len(rhos), 'seed')}. At 1 both order the sites alike; at 0 the score does not tell the other's "
        "order. It describes these runs; it is no test."
    )


def _allocation(analysis: Analysis) -> tuple[Block, ...]:
    figures = allocation_figures(analysis)
    if not analysis.allocation:
        return figures
    allocated = analysis.allocation
    return (
        *figures,
        allocation_tables.allocation_value_table(allocated),
        *allocation_tables.control_blocks(analysis.against_controls),
        allocation_tables.rank_by_matrix_table(allocated),
        allocation_tables.allocation_table(allocated),
        allocation_tables.allocation_course_table(allocated),
    )


def _quantization(analysis: Analysis) -> tuple[Block, ...]:
    if not analysis.quantization:
        return (Paragraph("No finished run of this study quantized the backbone."),)
    impacts = analysis.quantization
    always = (
        quantization_tables.quantization_table(impacts),
        quantization_tables.against_float_table(impacts),
        quantization_tables.quantization_cost_table(impacts),
        size_tables.size_table(impacts),
    )
    measured = (
        size_tables.bytes_table(impacts),
        size_tables.layers_table(impacts),
        quantization_tables.balance_table(impacts),
    )
    return (*always, *(table for table in measured if table.rows))


def _methods(analysis: Analysis) -> tuple[Block, ...]:
    figures = comparison_figures(analysis)
    if not analysis.methods:
        return figures
    forest = {drawing.slug: drawing for drawing in forests(analysis)}
    compared: tuple[Block, ...] = tuple(
        block
        for reference in dict.fromkeys(c.reference for c in analysis.comparisons)
        for block in (
            forest.get(f"differences_to_{reference}"),
            tables.comparison_table(analysis.comparisons, reference),
        )
        if block is not None
    )
    if not analysis.comparisons:
        compared = (
            Paragraph("No paired differences: no linear probe or LoRA run has finished beside another method."),
        )
    accuracy, quality = tables.accuracy_table(analysis.methods), tables.quality_table(analysis.methods)
    first, *rest = figures
    panels = pareto_panels(analysis.fronts, analysis.methods)
    diagram = reliability_diagram(analysis.calibration, validation_means(analysis.methods))
    pairs, fronts = pair_tables.pair_blocks(analysis.pairs), pair_tables.front_blocks(analysis.fronts)
    return (
        first,
        accuracy,
        *compared,
        *pairs,
        *rest,
        tables.cost_table(analysis.methods),
        *panels,
        *fronts,
        quality,
        *diagram,
        *calibration_tables.calibration_blocks(analysis.calibration, analysis.calibration_differences),
        calibration_tables.convergence_table(analysis.convergence),
    )


def _insights(analysis: Analysis) -> tuple[Block, ...]:
    return findings_tables.findings_blocks(analysis.study, analysis.findings)
