"""From an analysis to the report of one study: which table and figure stands where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from statistics import fmean

from peft_vit.analysis import Analysis, FisherAgreement, StudyAgreement
from peft_vit.report import (
    allocation_tables,
    calibration_tables,
    findings_tables,
    layer_tables,
    pair_tables,
    quantization_tables,
    summary,
    tables,
)
from peft_vit.report.document import SECTION_TITLES, Block, Paragraph, StudyDocument
from peft_vit.report.examples import Thumbnails, example_blocks
from peft_vit.report.figure import leading, validation_means
from peft_vit.report.forest_plot import accuracy_by_method, forests
from peft_vit.report.formatting import counted, fixed, joined, plain
from peft_vit.report.heatmaps import importance_maps, rank_maps
from peft_vit.report.lines import loss_curves, reliability_diagram, stopping_blocks
from peft_vit.report.scatter import accuracy_against, pareto_panels

MAPS = 6
_EVERY_RUN = " `peft-vit export --format history` writes those of every run."


def study_documents(
    analyses: Sequence[Analysis], agreements: Sequence[StudyAgreement] = (), thumbnails: Thumbnails | None = None
) -> tuple[StudyDocument, ...]:
    """Return one document a study, each with a slug of its own.

    Args:
        analyses: of the studies.
        agreements: between them.
        thumbnails: gets pictures of test images.
    """
    documents: dict[str, StudyDocument] = {}
    for analysis in analyses:
        study = analysis.study
        base = slug = slug_of(study.label)
        number = 2
        while slug in documents:
            slug, number = f"{base}_{number}", number + 1
        own = [a for a in agreements if study.label in (a.study, a.other)]
        contents: tuple[tuple[Block, ...], ...] = ((),) * len(SECTION_TITLES)
        if study.runs:
            contents = (
                tuple(_importance(analysis, own)),
                tuple(_allocation(analysis)),
                tuple(_quantization(analysis)),
                (*_methods(analysis), *example_blocks(analysis, thumbnails)),
                findings_tables.findings_tables(analysis.findings),
            )
        documents[slug] = StudyDocument(
            label=plain(study.label),
            slug=slug,
            notices=tuple(map(plain, study.notices)),
            facts=summary.facts(study),
            cards=summary.cards(analysis.methods),
            came_out=summary.came_out(analysis),
            how_sure=summary.how_sure(analysis),
            progress=summary.progress(study),
            sections=dict(zip(SECTION_TITLES, contents, strict=True)),
            not_shown=summary.not_shown(study),
            runs=summary.run_details(study),
            disclaimer=plain(study.disclaimer),
        )
    return tuple(documents.values())


def slug_of(name: str) -> str:
    """Return a name that is safe as part of a file name and of an anchor."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:64] or "study"


def _importance(analysis: Analysis, agreements: Sequence[StudyAgreement]) -> Iterator[Block]:
    patterns = analysis.importance
    if patterns:
        shown, note = leading(patterns, validation_means(analysis.methods), MAPS)
        yield importance_maps(shown, note and note + _EVERY_RUN)
    else:
        yield Paragraph("No figure of importance: no finished run of this study recorded importance scores.")
    yield from (Paragraph(_fisher_line(agreement)) for agreement in analysis.fisher)
    if patterns:
        yield layer_tables.importance_table(patterns)
        yield layer_tables.importance_by_block_table(patterns)
        yield layer_tables.importance_over_time_table(patterns)
        yield layer_tables.importance_course_table(patterns)
        yield layer_tables.seed_agreement_table(analysis.seed_agreements)
        if agreements:
            yield layer_tables.study_agreement_table(agreements)


def _fisher_line(agreement: FisherAgreement) -> str:
    """Return how far the score `fisher` is from what it stands in for."""
    rhos = agreement.rhos
    images = joined(str(count) for count in sorted({check.images for check in agreement.checks}))
    sites = sorted({len(check.minibatch) for check in agreement.checks})
    value = "undefined, one of both is constant"
    if rhos:
        value = fixed(fmean(rhos)) + (f" (from {fixed(min(rhos))} to {fixed(max(rhos))})" if len(rhos) > 1 else "")
    return (
        f"{plain(agreement.experiment.name)}: the score fisher (minibatch empirical Fisher) against the per-sample "
        f"empirical Fisher of the same {images} training images after training, Spearman's rho over the "
        f"{'–'.join(str(count) for count in dict.fromkeys((sites[0], sites[-1])))} sites with rank: {value}, "
        f"{counted(len(rhos), 'seed')}. At 1 both order the sites alike; at 0 the score does not tell the other's "
        "order. It describes these runs; it is no test."
    )


def _allocation(analysis: Analysis) -> Iterator[Block]:
    allocated = analysis.allocation
    mapped = [a for a in allocated if a.maps]
    if mapped:
        shown, note = leading(mapped, validation_means(analysis.methods), MAPS)
        yield rank_maps(shown, note and note + _EVERY_RUN)
    else:
        yield Paragraph("No rank maps: the study has no finished AdaLoRA run that recorded its ranks.")
    if allocated:
        yield allocation_tables.allocation_value_table(allocated)
        yield from allocation_tables.control_blocks(analysis.against_controls)
        yield allocation_tables.rank_by_matrix_table(allocated)
        yield allocation_tables.allocation_table(allocated)
        yield allocation_tables.allocation_course_table(allocated)


def _quantization(analysis: Analysis) -> Iterator[Block]:
    impacts = analysis.quantization
    if not impacts:
        yield Paragraph("No finished run of this study quantized the backbone.")
        return
    yield quantization_tables.quantization_table(impacts)
    yield quantization_tables.against_float_table(impacts)
    yield quantization_tables.quantization_cost_table(impacts)
    yield quantization_tables.size_table(impacts)
    measured = (quantization_tables.bytes_table, quantization_tables.layers_table, quantization_tables.balance_table)
    yield from (table for table in (make(impacts) for make in measured) if table.rows)


def _methods(analysis: Analysis) -> Iterator[Block]:
    methods, means = analysis.methods, validation_means(analysis.methods)
    yield accuracy_by_method(analysis.study, methods)
    yield tables.accuracy_table(methods)
    yield from stopping_blocks(analysis.study, analysis.courses, means)
    forest = forests(analysis)
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        if reference in forest:
            yield forest[reference]
        yield tables.comparison_table(analysis.comparisons, reference)
    if not analysis.comparisons:
        yield Paragraph("No paired differences: no linear probe or LoRA run has finished beside another method.")
    yield from pair_tables.pair_blocks(analysis.pairs)
    yield accuracy_against("final_parameters", methods)
    yield accuracy_against("stored_bytes", methods)
    yield loss_curves(analysis.study, means)
    yield tables.cost_table(methods)
    yield from pareto_panels(analysis.fronts, methods)
    yield from pair_tables.front_blocks(analysis.fronts)
    yield tables.quality_table(methods)
    yield from reliability_diagram(analysis.calibration, means)
    yield from calibration_tables.calibration_blocks(analysis.calibration, analysis.calibration_differences)
    yield calibration_tables.convergence_table(methods)
