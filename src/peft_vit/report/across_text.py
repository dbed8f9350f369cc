"""Several studies side by side and pooled, as text, and as rows for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peft_vit.analysis.across import Across, InStudy, PooledRow
from peft_vit.analysis.comparability import PoolKind
from peft_vit.analysis.comparison import Estimate
from peft_vit.report.document import Paragraph, Raw, Row, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    joined,
    known,
    megabytes,
    number_interval,
    percent_interval,
    points_interval,
)
from peft_vit.report.layer_tables import study_agreement_table
from peft_vit.report.rows import print_with_rows
from peft_vit.report.tables import OTHER_SEEDS
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
    for one in found.studies:
        runs = len(one.study.runs)
        backbones = sorted({run.record.spec.backbone.model for run in one.study.runs})
        data = sorted({run.record.spec.data.title for run in one.study.runs})
        yield Paragraph(
            f"Study {one.label}: {joined(data) or 'no data'}, {joined(backbones) or 'no backbone'}, "
            f"{runs} finished run{'' if runs == 1 else 's'}."
        )
        yield from (Paragraph(f"  {notice}") for notice in one.study.notices)
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
    return Table.of(
        "by_study",
        "By study",
        (_study_row(row, f"against {found.reference} (points)") for row in found.rows),
        f"95 % t intervals: {OTHER_SEEDS}. Pairs share seed, weights, images "
        "and split; the exact Wilcoxon signed-rank test decides at 5 %, Holm-corrected over a study's experiments.",
    )


def _study_row(row: InStudy, against: str) -> Row:
    result, comparison = row.result, row.comparison
    difference, pairs, verdict = "–", "–", "–"
    if comparison is not None:
        difference, pairs = points_interval(comparison.interval), str(len(comparison.by_seed))
        verdict = _verdict(comparison) + (f" ({comparison.note})" if comparison.note else "")
    return {
        "experiment": row.name,
        "study": row.study,
        "test accuracy": percent_interval(result.test_accuracy),
        "n": result.test_accuracy.n,
        against: difference,
        "pairs": pairs,
        "more accurate?": verdict,
        "to store": megabytes(result.stored_bytes),
        "parameters": count(result.final_parameters),
        "s a step": known(result.seconds_per_step, fixed),
    }


def _verdict(comparison: Estimate) -> str:
    significance = comparison.significance
    if significance is None or not significance.decidable or comparison.adjusted_p is None:
        return comparison.verdict if significance is None else significance.sentence()
    return f"{comparison.verdict} (p = {comparison.adjusted_p:.2g})"


def _pooled(rows: Sequence[PooledRow], reference: str) -> Table:
    return Table.of(
        "pooled",
        f"Over studies: test accuracy against {reference} (points)",
        (
            {
                "experiment": row.estimate.name,
                "studies": len(row.studies),
                "pairs": row.interval.n,
                "mean over studies": _with_reason(row.interval, points_interval(row.interval)),
                "ahead in": f"{row.ahead} of {len(row.studies)}",
                "p (Holm)": known(row.estimate.adjusted_p, "{:.2g}".format),
                "more accurate?": row.estimate.verdict + (f" ({row.estimate.note})" if row.estimate.note else ""),
            }
            for row in rows
        ),
        "Each study's mean counts the same. 95 % intervals: what other seeds would change in these studies; none "
        "of them speaks of another data set or backbone. The stratified t test decides at 5 %, Holm-corrected over "
        "this table.",
    )


def _with_reason(interval: Interval, written: str) -> str:
    return written + (f" ({interval.reason})" if interval.reason else "")


def _times(rows: Sequence[PooledRow], reference: str) -> Table:
    return Table.of(
        "times",
        f"Over studies: seconds a step, as a multiple of {reference}'s",
        (
            {
                "experiment": row.estimate.name,
                "studies": len(row.studies),
                "pairs": row.interval.n,
                "geometric mean over studies": _with_reason(row.interval, number_interval(row.interval)),
            }
            for row in rows
        ),
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
    difference = found.reference, "test_accuracy_difference"
    for one in found.rows:
        yield _row(("accuracy", one.study, one.name, None, "test_accuracy"), one.result.test_accuracy)
        c = one.comparison
        if c is not None:
            p = None if c.significance is None else c.significance.p_value
            tested = p, c.adjusted_p, c.verdict
            yield _row(("difference", one.study, one.name, *difference), c.interval, c.note, tested)
    for row in found.pooled:
        estimate = row.estimate
        p = None if estimate.significance is None else estimate.significance.p_value
        named = "pooled", "; ".join(row.studies), estimate.name, *difference
        yield _row(named, row.interval, _although(row), (p, estimate.adjusted_p, estimate.verdict))
    for agreement in found.agreements:
        rho = None if agreement.rho is None else Interval(agreement.rho, None, None, agreement.sites, 0.95)
        experiments = f"{agreement.experiment}; {agreement.other_experiment}"
        studies = f"{agreement.study}; {agreement.other}"
        note = "n counts sites" if agreement.same_backbone else "n counts sites; the backbones differ"
        yield _row(("importance agreement", studies, experiments, None, f"{agreement.metric}_spearman_rho"), rho, note)
    for time in found.times:
        named = "pooled", "; ".join(time.studies), time.estimate.name, found.reference, "seconds_per_step_ratio"
        yield _row(named, time.interval, _although(time))
    for refusal in found.refusals:
        for name in refusal.experiments:
            named = "not pooled", "; ".join(refusal.studies), name, found.reference, _what(refusal.kind)
            yield _row(named, None, f"{refusal.kind} {_differ(refusal.kind)}: {refusal.reason}")


def _although(row: PooledRow) -> str:
    return "; ".join(f"{kind} {_differ(kind)}: {why}" for kind, why in row.allowed)


def _row(
    named: tuple[str | None, ...], found: Interval | None, note: str = "", tested: tuple[Raw, ...] = (None, None, None)
) -> dict[str, Raw]:
    """Return a row of the file: the five columns that name it, an interval, p-values and verdict, and notes."""
    values = (None, None, None, 0) if found is None else (found.estimate, found.low, found.high, found.n)
    notes = "; ".join(part for part in (found.reason if found else "", note) if part)
    return dict(zip(_COLUMNS, (*named, *values, *tested, notes), strict=True))
