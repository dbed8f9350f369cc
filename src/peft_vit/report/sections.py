"""From an analysis to the report of one study: which table and figure stands where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from peft_vit.analysis import Analysis
from peft_vit.records import FisherCheck
from peft_vit.report import findings_tables, layer_tables, method_tables, quantization_tables, summary
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
    analyses: Sequence[Analysis], agreements: Sequence[Mapping[str, Any]] = (), thumbnails: Thumbnails | None = None
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
        own = [a for a in agreements if study.label in (a["study"], a["other_study"])]
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


def _importance(analysis: Analysis, agreements: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    patterns = analysis.importance
    if patterns:
        shown, note = leading(patterns, validation_means(analysis.methods), MAPS)
        yield importance_maps(shown, note and note + _EVERY_RUN)
    else:
        yield Paragraph("No figure of importance: no finished run of this study recorded importance scores.")
    yield from (Paragraph(_fisher_line(name, checks)) for name, checks in analysis.fisher.items())
    if patterns:
        yield from layer_tables.importance_tables(patterns)
        if agreements:
            yield layer_tables.study_agreement_table(agreements)


def _fisher_line(experiment: str, checks: Sequence[FisherCheck]) -> str:
    """Return how far the score `fisher` is from what it stands in for."""
    rhos = [check.rho for check in checks if check.rho is not None]
    images = joined(str(count) for count in sorted({check.images for check in checks}))
    sites = sorted({len(check.minibatch) for check in checks})
    value = "undefined, one of both is constant"
    if rhos:
        value = fixed(fmean(rhos)) + (f" (from {fixed(min(rhos))} to {fixed(max(rhos))})" if len(rhos) > 1 else "")
    return (
        f"{plain(experiment)}: the score fisher (minibatch empirical Fisher) against the per-sample "
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
        yield from layer_tables.allocation_tables(allocated, analysis.against_controls)


def _quantization(analysis: Analysis) -> Iterator[Block]:
    impacts = analysis.quantization
    if not impacts:
        yield Paragraph("No finished run of this study quantized the backbone.")
        return
    yield from quantization_tables.quantization_tables(impacts)


def _methods(analysis: Analysis) -> Iterator[Block]:
    methods, means = analysis.methods, validation_means(analysis.methods)
    yield accuracy_by_method(analysis.study, methods)
    yield method_tables.accuracy_table(methods)
    yield from stopping_blocks(analysis.study, analysis.courses, means)
    forest = forests(analysis)
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        if reference in forest:
            yield forest[reference]
        yield method_tables.comparison_table(analysis.comparisons, reference)
    if not analysis.comparisons:
        yield Paragraph("No paired differences: no linear probe or LoRA run has finished beside another method.")
    yield from method_tables.pair_blocks(analysis.pairs)
    yield accuracy_against("final_parameters", methods)
    yield accuracy_against("stored_bytes", methods)
    yield loss_curves(analysis.study, means)
    yield method_tables.cost_table(methods)
    yield from pareto_panels(analysis.fronts, methods)
    yield from method_tables.front_blocks(analysis.fronts)
    yield method_tables.quality_table(methods)
    yield from reliability_diagram(analysis.calibration, means)
    yield from method_tables.calibration_blocks(methods, analysis.calibration, analysis.calibration_differences)
    yield method_tables.convergence_table(methods)
