"""The report on all records below a directory: which table and figure is where, and which files it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft_vit.base.console import quoted
from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import SECTION_TITLES, Block, Paragraph, StudyDocument
from peft_vit.deploy.page.figure import leading
from peft_vit.deploy.page.files import WrittenFiles, write_markdown, write_report
from peft_vit.deploy.page.formatting import megabytes, plain
from peft_vit.deploy.page.model_page import CARD_FILE, ModelSummary, card_head, card_text, model_document
from peft_vit.deploy.page.provenance import images_name
from peft_vit.deploy.page.quality import model_quality
from peft_vit.deploy.page.web_page import PAGE_FILE
from peft_vit.lab.analysis import Analysis, Results, analyze, read_results
from peft_vit.lab.analysis.comparison import validation_means
from peft_vit.lab.report import study_tables, summary
from peft_vit.lab.report.figures import accuracy_by_method, forests, importance_maps, loss_curves, rank_maps
from peft_vit.runs.records.storage import RECORD_FILE, single_run

MARKDOWN_FILE = "analysis_summary.md"
MAPS = 6
_EVERY_RUN = " `peft-vit export --format history` writes those of every run."
# From a run's record and positions in its data set to PNG files; raises UserError if the images are not at hand.
Thumbnails = Callable[[RunRecord, Sequence[int]], list[bytes]]


def study_documents(analyses: Sequence[Analysis], call: str = "") -> tuple[StudyDocument, ...]:
    """Return one document a study, each with a slug of its own; of a call of `train` without a run how to continue.

    Args:
        analyses: of the studies.
        call: the command whose folder it is, if it is one of `train`.
    """
    documents: dict[str, StudyDocument] = {}
    for analysis in analyses:
        study = analysis.study
        waits = bool(call and not (study.runs or study.failed))
        base = slug = slug_of(study.label)
        number = 2
        while slug in documents:
            slug, number = f"{base}_{number}", number + 1
        documents[slug] = StudyDocument(
            label=plain(study.label),
            slug=slug,
            alerts=tuple(map(plain, filter(None, [study.disclaimer]))),
            warnings=() if waits else tuple(plain(notice) for notice in study.notices if notice != study.disclaimer),
            facts=() if waits else summary.facts(study),
            cards=summary.cards(analysis.methods),
            came_out=summary.came_out(analysis),
            how_sure=summary.how_sure(analysis),
            progress=() if waits else summary.progress(study),
            commands=(("To continue", call),) if call else (),
            sections=_sections(analysis) if study.runs else dict.fromkeys(SECTION_TITLES, ()),
            not_shown=summary.not_shown(study),
            runs=summary.run_details(study),
        )
    return tuple(documents.values())


def slug_of(name: str) -> str:
    """Return a name that is safe as part of a file name and of an anchor."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:64] or "study"


def _sections(analysis: Analysis) -> dict[str, tuple[Block, ...]]:
    """Return the blocks of each section of a study with finished runs, by SECTION_TITLES; accuracy comes first."""
    compared, means = tuple(_compared(analysis)), validation_means(analysis.methods)
    if not analysis.study.scores.metric.counts_images:
        return dict.fromkeys(SECTION_TITLES, ()) | {SECTION_TITLES[0]: compared}
    importance: Block = Paragraph("No figure of importance: no finished run of this study recorded importance scores.")
    if analysis.importance:
        patterns, note = leading(analysis.importance, means, MAPS)
        importance = importance_maps(patterns, note and note + _EVERY_RUN)
    allocated: list[Block] = [Paragraph("No rank maps: the study has no finished AdaLoRA run that recorded its ranks.")]
    if analysis.allocation:
        shown, note = leading(analysis.allocation, means, MAPS)
        allocated = [
            rank_maps(shown, note and note + _EVERY_RUN),
            study_tables.against_fixed_table(analysis.allocation),
        ]
    quantized = tuple(study_tables.quantization_tables(analysis.quantization))
    insights = Paragraph("No insight: no sentence of this report is about the finished runs of this study.")
    return {
        "Method comparison": compared,
        "Layer importance patterns": (importance,),
        "Allocation effectiveness": tuple(allocated),
        "Quantization impact": quantized or (Paragraph("No finished run of this study quantized the backbone."),),
        "Insights": (study_tables.findings_table(analysis.findings) if analysis.findings else insights,),
    }


def _compared(analysis: Analysis) -> Iterator[Block]:
    """Yield how methods compare, which is all that a report says of other tasks than one class an image."""
    study, methods, forest = analysis.study, analysis.methods, forests(analysis)
    means = validation_means(methods)
    yield accuracy_by_method(study, methods)
    yield study_tables.accuracy_table(methods)
    for reference in dict.fromkeys(c.reference for c in analysis.comparisons):
        if reference in forest:
            yield forest[reference]
        yield study_tables.comparison_table(analysis.comparisons, reference, study.scores)
    if not analysis.comparisons:
        yield Paragraph("No paired differences: no linear probe or LoRA run has finished beside another method.")
    yield loss_curves(study, means)
    yield study_tables.cost_table(methods)
    yield study_tables.convergence_table(methods)


@dataclass(frozen=True)
class ReportFiles(WrittenFiles):
    """Where a report lies."""

    results: Results  # what it is on, and what was left out of it


def build_report(
    results_dir: Path,
    output_dir: Path,
    *,
    page: bool = True,
    publication: bool = False,
    thumbnails: Thumbnails | None = None,
    maps: Callable[..., Any] | None = None,
    call: str = "",
    seconds: float | None = None,
) -> ReportFiles:
    """Write the report on all records below a directory that can be read: HTML, Markdown, figures, tables.

    Of a single run that is the page of its model, with card.md instead of analysis_summary.md.

    Args:
        results_dir: where records lie, at any depth.
        output_dir: where to write; files of an earlier report are replaced.
        page: also write the HTML; the summary has the same tables and figures.
        publication: also draw every figure at the widths of a paper, which takes several times as long.
        thumbnails: gets test images for the page of a model, from where they lie; None: no pictures.
        maps: likewise gets where it looked.
        call: the command whose folder it is, if it is one of `train`.
        seconds: that it took.

    Raises:
        UserError: if there is no record that can be read, or if the output can't be written.
    """
    run = single_run(results_dir)  # of a call of `train` alone: its trainings on folds are no study to report
    results = read_results(run if os.path.isfile(run / RECORD_FILE) else results_dir)
    model = _only_model(results, results_dir, output_dir, call, seconds)
    if model is not None:
        pictures = thumbnails and partial(thumbnails, model.record)
        looked = maps and partial(maps, model.record)
        documents: tuple[StudyDocument, ...] = (model_document(model, pictures, looked),)
        head = card_head(model, "peft-vit", images_name(model.record.spec.data))
        markdown = {CARD_FILE: card_text(documents[0], head, f"```\n{next(iter(model.commands.values()))}\n```")}
    else:
        documents = study_documents([analyze(study) for study in results.studies], call)
        markdown = {MARKDOWN_FILE: write_markdown(documents)}
    written = write_report(documents, markdown, output_dir, page=page, publication=publication)
    return ReportFiles(**vars(written), results=results)


def _only_model(
    results: Results, results_dir: Path, output_dir: Path, call: str, seconds: float | None
) -> ModelSummary | None:
    """Return the model of the only run that there is or was planned; None of studies of several runs."""
    runs = [run for study in results.studies for run in study.runs]
    if len(runs) != 1 or any(study.failed or study.unfinished for study in results.studies):
        return None
    record = runs[0].record
    if model_quality(record) is None and not (record.test is not None and record.test.more):
        return None
    folder = next(results.directory.rglob(RECORD_FILE)).parent
    pages = (place / name for place in (results_dir, folder) for name in (f"web/{PAGE_FILE}", "model.html"))
    page = next((os.path.relpath(page, output_dir) for page in pages if page.is_file()), None)
    place = quoted(results_dir if call else folder)
    commands = {"To predict": f"peft-vit predict {place} PHOTO.jpg"}
    if (sizes := record.bytes) is not None and (in_4_bits := sizes.in_4_bits_bytes) is not None:
        commands[f"As a file in 4 bits, {megabytes(in_4_bits)}"] = f"peft-vit export {place} --bits 4"
    if page is None:
        bits = " --bits 4" if record.quantization is None else ""
        commands["To try it in a browser"] = f"peft-vit export {place} --format web{bits}"
    return ModelSummary(
        record,
        commands,
        on_folds=record.on_folds,
        web="" if page is None else quote(Path(page).as_posix()),
        call=call,
        seconds=seconds,
    )
