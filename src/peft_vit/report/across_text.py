"""Several studies side by side and pooled, as text, and as rows for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peft_vit.analysis.across import Across, InStudy, PooledDifference, PooledTime
from peft_vit.analysis.comparability import PoolKind
from peft_vit.analysis.comparison import Comparison
from peft_vit.analysis.stability import StudyAgreement
from peft_vit.records import write_atomically
from peft_vit.report.document import Paragraph, Raw, Row, Table
from peft_vit.report.formatting import count, fixed, megabytes, percent_interval, points_interval
from peft_vit.report.rows import encoded, writing
from peft_vit.report.tables import OTHER_SEEDS, ends
from peft_vit.report.terminal import print_blocks
from peft_vit.statistics import Interval

_NOT_OF_ACCURACY: tuple[PoolKind, ...] = ("timings",)
_NOT_OF_TIMES: tuple[PoolKind, ...] = ("splits", "weights")
COLUMNS = (
    "row",
    "study",
    "experiment",
    "reference",
    "measure",
    "estimate",
    "low",
    "high",
    "n",
    "p_value",
    "p_holm",
    "verdict",
    "note",
)


def print_comparison(found: Across, output: Path | None) -> None:
    """Print the tables; write their unrounded values to a .csv or .json file if one is named.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    rows = comparison_rows(found)
    content = None if output is None else encoded(rows, COLUMNS, output)
    print_blocks(comparison_blocks(found))
    if output is not None and content is not None:
        with writing(output):
            write_atomically(output, content)
        print_blocks([Paragraph(f"{len(rows)} rows: {output}")])


def comparison_blocks(found: Across) -> Iterator[Paragraph | Table]:
    """Yield what was found, by study and pooled, and what was not pooled and why."""
    for one in found.studies:
        runs = len(one.study.runs)
        backbones = sorted({run.record.spec.backbone.model for run in one.study.runs})
        data = sorted({run.record.spec.data.dataset for run in one.study.runs})
        yield Paragraph(
            f"Study {one.label}: {', '.join(data) or 'no data'}, {', '.join(backbones) or 'no backbone'}, "
            f"{runs} finished run{'' if runs == 1 else 's'}."
        )
        yield from (Paragraph(f"  {notice}") for notice in one.study.notices)
    if found.alone:
        alone = ", ".join(f"{name} (in {study})" for name, study in found.alone.items())
        yield Paragraph(f"In one study only, so not compared: {alone}.")
    yield _by_study(found)
    if found.agreements:
        yield _agreements(found.agreements)
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
    yield from map(Paragraph, _refused(found))
    yield from map(Paragraph, _allowed(found))


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
        difference, pairs = points_interval(comparison.difference), str(len(comparison.seeds))
        verdict = _verdict(comparison) + (f" ({comparison.note})" if comparison.note else "")
    return {
        "experiment": row.name,
        "study": row.study,
        "test accuracy": percent_interval(result.test_accuracy),
        "n": str(result.test_accuracy.n),
        against: difference,
        "pairs": pairs,
        "more accurate?": verdict,
        "to store": megabytes(result.frozen_bytes + result.adapter_file_bytes),
        "parameters": count(result.final_parameters),
        "s a step": "–" if result.seconds_per_step is None else fixed(result.seconds_per_step),
    }


def _verdict(comparison: Comparison) -> str:
    significance = comparison.significance
    if significance is None or not significance.decidable or comparison.adjusted_p is None:
        return comparison.verdict if significance is None else significance.sentence()
    return f"{comparison.verdict} (p = {comparison.adjusted_p:.2g})"


def _pooled(rows: Sequence[PooledDifference], reference: str) -> Table:
    return Table.of(
        "pooled",
        f"Over studies: test accuracy against {reference} (points)",
        (
            {
                "experiment": row.name,
                "studies": str(len(row.studies)),
                "pairs": str(row.pooled.interval.n),
                "mean over studies": _points(row.pooled.interval),
                "ahead in": f"{row.ahead} of {len(row.studies)}",
                "p (Holm)": "–" if row.adjusted_p is None else f"{row.adjusted_p:.2g}",
                "more accurate?": row.verdict,
                "interquartile mean": _points(row.interquartile, row.interquartile_note),
                "mixed model": _mixed(row),
            }
            for row in rows
        ),
        "Each study's mean counts the same. 95 % intervals: what other seeds would change in these studies; none "
        "of them speaks of another data set or backbone. The stratified t test decides at 5 %, Holm-corrected over "
        "this table. Interquartile mean: stratified bootstrap. Mixed model: random intercept by study, the effect "
        "taken to be the same in all.",
    )


def _points(interval: Interval | None, note: str = "") -> str:
    if interval is None:
        return f"– ({note})" if note else "–"
    reason = interval.reason or note
    return points_interval(interval) + (f" ({reason})" if reason else "")


def _mixed(row: PooledDifference) -> str:
    fit = row.mixed
    if fit.estimate is None:
        return f"– ({fit.note})"
    return points_interval(_interval(row))


def _interval(row: PooledDifference) -> Interval | None:
    fit = row.mixed
    return None if fit.estimate is None else Interval(fit.estimate, fit.low, fit.high, fit.n, fit.confidence)


def _times(rows: Sequence[PooledTime], reference: str) -> Table:
    return Table.of(
        "times",
        f"Over studies: seconds a step, as a multiple of {reference}'s",
        (
            {
                "experiment": row.name,
                "studies": str(len(row.studies)),
                "pairs": str(row.ratio.n),
                "geometric mean over studies": _multiple(row.ratio),
            }
            for row in rows
        ),
        "95 % t intervals of the logarithms; each study counts the same.",
    )


def _multiple(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{fixed(ratio.estimate)} [no interval] ({ratio.reason})"
    return f"{fixed(ratio.estimate)} [{fixed(ratio.low)}, {fixed(ratio.high)}]"


def _agreements(rows: Sequence[StudyAgreement]) -> Table:
    return Table.of(
        "agreement",
        "Do two studies agree on which sites matter?",
        (
            {
                "metric": row.metric,
                "study": row.study,
                "experiment": row.experiment,
                "other study": row.other,
                "its experiment": row.other_experiment,
                "rho": "– (constant)" if row.rho is None else fixed(row.rho),
                "sites": str(row.sites),
                "backbone": "the same" if row.same_backbone else "another: sites share no more than a name",
            }
            for row in rows
        ),
        "Spearman's rho of mean relative scores at the last decision, over sites that both have. It describes: the "
        "sites of one network are no independent draws, so there is no interval and no p-value.",
    )


def _refused(found: Across) -> Iterator[str]:
    for one in found.refusals:
        yield (
            f"Not pooled, {_what(one.kind)}: {one.kind} {_differ(one.kind)}: {one.reason}. Experiments: "
            f"{', '.join(one.experiments)}; studies: {', '.join(one.studies)}. Pool all the same: "
            f"--allow-mismatch {one.kind}."
        )


def _what(kind: PoolKind) -> str:
    if kind in _NOT_OF_ACCURACY:
        return "seconds"
    return "accuracy" if kind in _NOT_OF_TIMES else "accuracy and seconds"


def _differ(kind: PoolKind) -> str:
    return "differs" if kind == "precision" else "differ"


def _allowed(found: Across) -> Iterator[str]:
    told: dict[tuple[PoolKind, str], list[str]] = {}
    rows: tuple[PooledDifference | PooledTime, ...] = (*found.pooled, *found.times)
    for row in rows:
        for kind, why in row.allowed:
            names = told.setdefault((kind, why), [])
            names += [row.name] if row.name not in names else []
    for (kind, why), names in told.items():
        yield f"Pooled although {kind} {_differ(kind)}, as asked: {why}. Experiments: {', '.join(names)}."


def comparison_rows(found: Across) -> list[dict[str, Raw]]:
    """Return everything as rows with COLUMNS as keys; accuracies and differences are shares."""
    rows: list[dict[str, Raw]] = []
    for one in found.rows:
        rows.append(_row("accuracy", one.study, one.name, None, "test_accuracy", one.result.test_accuracy))
        comparison = one.comparison
        if comparison is not None:
            p = None if comparison.significance is None else comparison.significance.p_value
            decision: dict[str, Raw] = {
                "p_value": p,
                "p_holm": comparison.adjusted_p,
                "verdict": comparison.verdict,
                "note": comparison.note,
            }
            named = one.study, one.name, found.reference, "test_accuracy_difference"
            rows.append(_row("difference", *named, comparison.difference) | decision)
    for row in found.pooled:
        named = "; ".join(row.studies), row.name, found.reference, "test_accuracy_difference"
        decision = {"p_value": row.pooled.p_value, "p_holm": row.adjusted_p, "verdict": row.verdict}
        note = "; ".join(f"{kind} {_differ(kind)}: {why}" for kind, why in row.allowed)
        rows.append(_row("pooled", *named, row.pooled.interval, note) | decision)
        rows.append(_row("interquartile mean", *named, row.interquartile, row.interquartile_note))
        rows.append(_row("mixed model", *named, _interval(row), row.mixed.note or ""))
    for agreement in found.agreements:
        rho = None if agreement.rho is None else Interval(agreement.rho, None, None, agreement.sites, 0.95)
        experiments = f"{agreement.experiment}; {agreement.other_experiment}"
        named = f"{agreement.study}; {agreement.other}", experiments, None, f"{agreement.metric}_spearman_rho"
        note = "n counts sites" if agreement.same_backbone else "n counts sites; the backbones differ"
        rows.append(_row("importance agreement", *named, rho, note))
    for time in found.times:
        named = "; ".join(time.studies), time.name, found.reference, "seconds_per_step_ratio"
        note = "; ".join(f"{kind} {_differ(kind)}: {why}" for kind, why in time.allowed)
        rows.append(_row("pooled", *named, time.ratio, note))
    for refusal in found.refusals:
        for name in refusal.experiments:
            named = "; ".join(refusal.studies), name, found.reference, _what(refusal.kind)
            rows.append(_row("not pooled", *named, None, f"{refusal.kind} {_differ(refusal.kind)}: {refusal.reason}"))
    return rows


def _row(
    row: str,
    study: str,
    experiment: str,
    reference: str | None,
    measure: str,
    interval: Interval | None,
    note: str = "",
) -> dict[str, Raw]:
    values = ends("estimate", interval)
    reason = interval.reason if interval is not None and interval.reason else ""
    return {
        "row": row,
        "study": study,
        "experiment": experiment,
        "reference": reference,
        "measure": measure,
        "estimate": values["estimate"],
        "low": values["estimate_low"],
        "high": values["estimate_high"],
        "n": values["n"],
        "p_value": None,
        "p_holm": None,
        "verdict": None,
        "note": "; ".join(part for part in (reason, note) if part),
    }
