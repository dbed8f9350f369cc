"""What commands print as tables: studies side by side and pooled, and times of exported models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

from peft_vit.analysis.across import Across, PooledRow, PoolKind
from peft_vit.analysis.comparison import Estimate
from peft_vit.records import BenchRow
from peft_vit.report.document import Paragraph, Raw, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    joined,
    megabytes,
    number_interval,
    percent_interval,
    points_interval,
)
from peft_vit.report.layer_tables import study_agreement_table
from peft_vit.report.rows import print_with_rows
from peft_vit.report.tables import OTHER_SEEDS, Column, table
from peft_vit.statistics import Interval

_NOT_OF_ACCURACY: tuple[PoolKind, ...] = ("timings",)
_NOT_OF_TIMES: tuple[PoolKind, ...] = ("splits", "weights")


def print_comparison(found: Across, output: Path | None) -> None:
    """Print the tables; write their unrounded values to a .csv or .json file if one is named.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    print_with_rows(_blocks(found), list(_rows(found)), output, _COLUMNS)


def _blocks(found: Across) -> Iterator[Paragraph | Table]:
    """Yield what was found, by study and pooled, and what was not pooled and why."""
    for label, study in found.studies.items():
        runs = len(study.runs)
        backbones = sorted({run.record.spec.backbone.model for run in study.runs})
        data = sorted({run.record.spec.data.title for run in study.runs})
        yield Paragraph(
            f"Study {label}: {joined(data) or 'no data'}, {joined(backbones) or 'no backbone'}, "
            f"{runs} finished run{'' if runs == 1 else 's'}."
        )
        yield from (Paragraph(f"  {notice}") for notice in study.notices)
    if found.alone:
        alone = joined(f"{name} (in {study})" for name, study in found.alone.items())
        yield Paragraph(f"In one study only, so not compared: {alone}.")
    yield _by_study(found)
    if found.agreements:
        yield study_agreement_table(found.agreements)
    if found.reference is None:
        yield Paragraph(
            "No LoRA and no linear probe is the reference of every study, so there are no differences; name an "
            "experiment with --reference."
        )
        return
    if found.pooled:
        yield _pooled(found.pooled, found.reference)
    if found.times:
        yield _times(found.times, found.reference)
    for refusal in found.refusals:
        kind = refusal.kind
        yield Paragraph(
            f"Not pooled, {_what(kind)}: {kind} {_differ(kind)}: {refusal.reason}. Experiments: "
            f"{joined(refusal.experiments)}; studies: {joined(refusal.studies)}. Pool all the same: "
            f"--allow-mismatch {kind}."
        )
    told: dict[tuple[PoolKind, str], dict[str, None]] = {}
    rows: tuple[PooledRow, ...] = (*found.pooled, *found.times)
    for row in rows:
        for kind, why in row.allowed:
            told.setdefault((kind, why), {})[row.estimate.name] = None
    for (kind, why), names in told.items():
        yield Paragraph(f"Pooled although {kind} {_differ(kind)}, as asked: {why}. Experiments: {joined(names)}.")


def _by_study(found: Across) -> Table:
    def tested(comparison: Estimate) -> str:
        significance, p = comparison.significance, comparison.adjusted_p
        verdict = comparison.verdict if significance is None else significance.sentence()
        if significance is not None and significance.decidable and p is not None:
            verdict = f"{comparison.verdict} (p = {p:.2g})"
        return verdict + (f" ({comparison.note})" if comparison.note else "")

    return table(
        "by_study",
        "By study",
        found.rows,
        [
            Column("experiment", "name"),
            "study",
            Column("test accuracy", "result.test_accuracy", percent_interval),
            Column("n", "result.test_accuracy.n"),
            Column(f"against {found.reference} (points)", "comparison", lambda c: points_interval(c.interval), ""),
            Column("pairs", "comparison", lambda c: str(len(c.by_seed)), ""),
            Column("more accurate?", "comparison", tested, ""),
            Column("to store", "result.stored_bytes", megabytes),
            Column("parameters", "result.final_parameters", count),
            Column("s a step", "result.seconds_per_step", fixed),
        ],
        f"95 % t intervals: {OTHER_SEEDS}. Pairs share seed, weights, images "
        "and split; the exact Wilcoxon signed-rank test decides at 5 %, Holm-corrected over a study's experiments.",
    )


def _with_reason(write: Callable[[Interval], str], interval: Interval) -> str:
    return write(interval) + (f" ({interval.reason})" if interval.reason else "")


_POOLED = [
    Column("experiment", "estimate.name"),
    Column("studies", lambda row: len(row.studies)),
    Column("pairs", "interval.n"),
]


def _pooled(rows: Sequence[PooledRow], reference: str) -> Table:
    return table(
        "pooled",
        f"Over studies: test accuracy against {reference} (points)",
        rows,
        [
            *_POOLED,
            Column("mean over studies", "interval", partial(_with_reason, points_interval)),
            Column("ahead in", lambda row: f"{row.ahead} of {len(row.studies)}"),
            Column("p (Holm)", "estimate.adjusted_p", "{:.2g}".format),
            Column("more accurate?", "estimate", lambda of: f"{of.verdict}{f' ({of.note})' if of.note else ''}"),
        ],
        "Each study's mean counts the same. 95 % intervals: what other seeds would change in these studies; none "
        "of them speaks of another data set or backbone. The stratified t test decides at 5 %, Holm-corrected over "
        "this table.",
    )


def _times(rows: Sequence[PooledRow], reference: str) -> Table:
    return table(
        "times",
        f"Over studies: seconds a step, as a multiple of {reference}'s",
        rows,
        [*_POOLED, Column("geometric mean over studies", "interval", partial(_with_reason, number_interval))],
        "95 % t intervals of the logarithms; each study counts the same.",
    )


def _what(kind: PoolKind) -> str:
    if kind in _NOT_OF_ACCURACY:
        return "seconds"
    return "accuracy" if kind in _NOT_OF_TIMES else "accuracy and seconds"


def _differ(kind: PoolKind) -> str:
    return "differs" if kind == "precision" else "differ"


# Of a row for other programs; accuracies and differences are shares.
_COLUMNS = (
    *("row", "study", "experiment", "reference", "measure"),
    *("estimate", "low", "high", "n"),
    *("p_value", "p_holm", "verdict"),
    "note",
)


def _rows(found: Across) -> Iterator[dict[str, Raw]]:
    def row(kind: str, studies: Iterable[str], measure: str, of: Estimate, note: str) -> dict[str, Raw]:
        reference = None if kind in ("accuracy", "importance agreement") else found.reference
        values = (None, None, None, 0) if of.interval is None else astuple(of.interval)[:4]
        p_value = None if of.significance is None else of.significance.p_value
        decided = (p_value, of.adjusted_p, of.verdict) if measure == difference else (None, None, None)
        notes = "; ".join(text for text in (None if of.interval is None else of.interval.reason, note) if text)
        cells = (kind, "; ".join(studies), of.name, reference, measure, *values, *decided, notes)
        return dict(zip(_COLUMNS, cells, strict=True))

    difference = "test_accuracy_difference"
    for own in found.rows:
        accuracy = Estimate(name=own.name, interval=own.result.test_accuracy)
        yield row("accuracy", [own.study], "test_accuracy", accuracy, "")
        if own.comparison is not None:
            yield row("difference", [own.study], difference, own.comparison, own.comparison.note)
    for pooled in found.pooled:
        yield row("pooled", pooled.studies, difference, pooled.estimate, _although(pooled))
    for of in found.agreements:
        rho = None if of["rho"] is None else Interval(of["rho"], None, None, of["sites"], 0.95)
        agreement = Estimate(name=f"{of['experiment']}; {of['other_experiment']}", interval=rho)
        note = "n counts sites" if of["same_backbone"] else "n counts sites; the backbones differ"
        studies = of["study"], of["other_study"]
        yield row("importance agreement", studies, f"{of['metric']}_spearman_rho", agreement, note)
    for time in found.times:
        yield row("pooled", time.studies, "seconds_per_step_ratio", time.estimate, _although(time))
    for refusal in found.refusals:
        note = f"{refusal.kind} {_differ(refusal.kind)}: {refusal.reason}"
        for name in refusal.experiments:
            yield row("not pooled", refusal.studies, _what(refusal.kind), Estimate(name=name), note)


def _although(row: PooledRow) -> str:
    return "; ".join(f"{kind} {_differ(kind)}: {why}" for kind, why in row.allowed)


def bench_table(rows: Sequence[BenchRow], repeats: int) -> Table:
    """Return a row a model, batch size and number of threads."""
    over = joined(dict.fromkeys(row.over for row in rows))
    runtimes = joined(sorted({row.runtime for row in rows}))
    return table(
        "bench",
        f"Calls on {rows[0].processor}; {runtimes}",
        rows,
        [
            "file",
            "format",
            Column("size", "bytes", megabytes),
            "threads",
            "batch",
            Column("median ms", lambda row: fixed(1000 * row.median_s)),
            Column("quartiles", lambda row: f"{fixed(1000 * row.low_s)} to {fixed(1000 * row.high_s)}"),
            Column("over float32", "ratio", lambda ratio: fixed(ratio, 3)),
            Column("images/s", "images_per_s", lambda rate: fixed(rate, 1)),
        ],
        f"Each model in {repeats} process{'' if repeats == 1 else 'es'} of its own, {rows[0].calls} calls in all. "
        f"Ratios are of medians, over the fastest float32 model at the same batch size and threads: {over}.",
    )
